"""Costs that `lorapar plan` has estimated, stored beside the artifacts for comparison with the actual cost.

When a step runs, its manifest records the estimate for its key. Settings that change only the cost are not
part of the key, so the latest plan overwrites earlier estimates.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

from pydantic import BaseModel, TypeAdapter

from stages.store.digests import replace_file

NAME = ".estimates.json"


class PlannedCost(BaseModel):
    """Time and peak memory of one step; None where unknown."""

    seconds: float | None = None
    mib: float | None = None


_FILE = TypeAdapter(dict[str, PlannedCost])


def save(root: Path, estimates: dict[str, PlannedCost]) -> None:
    """Add estimates, by key of the step, to those of the store. A read-only store is left without them."""
    merged = {**_read(root), **estimates}
    with suppress(OSError):
        replace_file(root / NAME, _FILE.dump_json(merged))


def load(root: Path, key: str) -> PlannedCost | None:
    """Return the estimate for the step of `key`, if there is one."""
    return _read(root).get(key)


def actual_and_planned(provenance: dict[str, Any]) -> tuple[PlannedCost, PlannedCost]:
    """Return the actual cost of a step and its earlier estimate from the `provenance` of its manifest."""
    peaks = provenance.get("peak_mib", {})  # missing in older manifests
    actual = PlannedCost(seconds=provenance["seconds"], mib=peaks.get("device", peaks.get("process")))
    return actual, PlannedCost.model_validate(provenance.get("estimated", {}))


def _read(root: Path) -> dict[str, PlannedCost]:
    with suppress(OSError, ValueError):  # ignore a damaged file: estimates only serve for comparison
        return _FILE.validate_json((root / NAME).read_bytes())
    return {}
