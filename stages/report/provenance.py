"""The provenance of artifacts on a page: cost, settings, versions."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from stages.config import Config
from stages.config.fields import Section as Settings
from stages.lora.training.curves import History
from stages.records import read_json
from stages.report.page import Block, Details, Grid
from stages.store.artifacts import Artifact
from stages.store.estimates import actual_and_planned

TWOFOLD = 2
"""Ratio of actual to planned cost, or its inverse, from which a cell is flagged."""


def cost(artifacts: dict[str, Artifact]) -> Grid:
    """Tabulate each step's actual cost beside its estimate; estimates off by TWOFOLD or more are flagged."""
    rows: list[list[str]] = []
    costs, flagged = [], set()
    for name, artifact in artifacts.items():
        provenance, summary = artifact.manifest["provenance"], artifact.manifest["summary"]
        share = summary.get("active_share")
        actual, planned = actual_and_planned(provenance)
        costs.append((actual.seconds, planned.seconds))
        factors = {2: _factor(actual.seconds, planned.seconds), 4: _factor(actual.mib, planned.mib)}
        flagged |= {(len(rows), column) for column, factor in factors.items() if factor}
        rows.append([
            name, _rounded(actual.seconds), _rounded(planned.seconds) + factors[2],
            _rounded(actual.mib), _rounded(planned.mib) + factors[4],
            _rounded(tokens(artifact)), _rounded(provenance.get("joules")),
            str(provenance.get("processes", 1)), provenance.get("dtype", ""),
            "" if share is None else f"{100 * share:.1f} %",
        ])  # fmt: skip
    head = ["step", "seconds", "planned", "memory, MiB", "planned", "tokens", "joules", "processes", "type"]
    caption = (
        "Planned: the estimate of lorapar plan, followed by actual / planned where these differ by a factor "
        "of two or more. Tokens: trained on, with prompts, or written by the evaluated model. Joules: by "
        "GPUs that report their energy."
    )
    if all(planned_s is not None for _, planned_s in costs):
        sums = [sum(seconds or 0 for seconds in column) for column in zip(*costs, strict=True)]
        caption += " Together {:.0f} seconds, planned {:.0f}.".format(*sums)
    return Grid([*head, "active elements"], rows, caption, frozenset(flagged))


def _factor(actual: float | None, planned: float | None) -> str:
    """Return `` (×3.1)`` where 3.1 times the plan was taken; "" where they differ by less than TWOFOLD."""
    if actual is None or planned is None:
        return ""
    larger, smaller = max(actual, planned), max(1.0, min(actual, planned))  # below 1, numbers round to 0
    return f" (×{max(1.0, actual) / max(1.0, planned):.2g})" if larger >= TWOFOLD * smaller else ""


def tokens(artifact: Artifact) -> float | None:
    """Count the tokens that a training read, or the evaluated model wrote; None if neither is recorded."""
    history = artifact.path / "history.json"
    if history.is_file():
        read = [row["num_tokens"] for row in read_json(history, History) if "num_tokens" in row]
        return read[-1] if read else None
    overall = artifact.manifest["summary"].get("all")
    if isinstance(overall, dict) and overall.get("tokens") is not None:
        return round(overall["tokens"] * overall["answers"])  # the mean length is stored
    return None


def _rounded(value: float | None) -> str:
    return "" if value is None else f"{value:.0f}"


def settings(config: Config, artifacts: dict[str, Artifact]) -> list[Block]:
    changed = [[name, json.dumps(value, ensure_ascii=False)] for name, value in _changed(config)]
    versions: dict[str, set[str]] = {}
    for artifact in artifacts.values():
        for package, version in artifact.manifest["provenance"].get("versions", {}).items():
            versions.setdefault(package, set()).add(version)
    numbers = [[package, ", ".join(sorted(found))] for package, found in sorted(versions.items())]
    folders = [[name, str(artifact.path)] for name, artifact in artifacts.items()]
    title = f"The {len(changed)} settings that differ from the defaults"
    tables = {
        title: Grid(["setting", "value"], changed, prose=True),
        "Versions": Grid(["package", "version"], numbers),
        "Folders of the artifacts": Grid(["step", "folder"], folders, prose=True),
    }
    return [Details(title, [table]) for title, table in tables.items() if table.rows]


def _changed(section: Settings, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield dotted name and value of each setting that differs from its default."""
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        default = None if field.is_required() else field.default
        if value == default:
            continue
        if isinstance(value, Settings) and (isinstance(default, Settings) or field.is_required()):
            yield from _changed(value, f"{prefix}{name}.")
        else:
            plain = section.model_dump(mode="json", exclude_defaults=True)
            yield f"{prefix}{name}", plain.get(name)
