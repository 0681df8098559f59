"""What `lorapar plan` told of steps, kept beside the artifacts: each manifest then says how good it was.

A step's key does not have settings that change only its cost; the last plan of a key is the one that counts.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from pydantic import BaseModel, TypeAdapter

NAME = ".estimates.json"


class PlannedCost(BaseModel):
    """Of one step."""

    seconds: float | None = None
    mib: float | None = None


_FILE = TypeAdapter(dict[str, PlannedCost])


def save(root: Path, found: dict[str, PlannedCost]) -> None:
    """Keep them by the keys of their steps. A store that cannot be written stays without."""
    told = {**_read(root), **found}  # by others or before
    with suppress(OSError):
        root.mkdir(parents=True, exist_ok=True)
        temporary = root / f"{NAME}.{os.getpid()}"
        temporary.write_bytes(_FILE.dump_json(told))
        os.replace(temporary, root / NAME)


def load(root: Path, key: str) -> PlannedCost | None:
    """What was told of a step, if anything."""
    return _read(root).get(key)


def actual_and_planned(provenance: dict[str, Any]) -> tuple[PlannedCost, PlannedCost]:
    """What a manifest says that its step took, and what had been told before."""
    peaks = provenance.get("peak_mib", {})  # older ones have none
    took = PlannedCost(seconds=provenance["seconds"], mib=peaks.get("device", peaks.get("process")))
    return took, PlannedCost.model_validate(provenance.get("estimated", {}))


def _read(root: Path) -> dict[str, PlannedCost]:
    with suppress(OSError, ValueError):  # a damaged file is as good as none: it only serves to compare
        return _FILE.validate_json((root / NAME).read_bytes())
    return {}
