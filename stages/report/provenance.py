"""What a page says of how artifacts were made: cost, settings, versions."""

from __future__ import annotations

import json
from typing import Any

from stages.config import Config
from stages.config.fields import Section as Settings
from stages.report.page import Details, Grid, Part
from stages.store.artifacts import Artifact
from stages.store.estimates import actual_and_planned


def cost(found: dict[str, Artifact]) -> Grid:
    rows = []
    for name, artifact in found.items():
        provenance, summary = artifact.manifest["provenance"], artifact.manifest["summary"]
        share = summary.get("active_share")
        took, told = actual_and_planned(provenance)
        rows.append([
            name, _rounded(took.seconds), _rounded(told.seconds), _rounded(took.mib), _rounded(told.mib),
            _rounded(tokens(artifact)), _rounded(provenance.get("joules")),
            str(provenance.get("processes", 1)), provenance.get("dtype", ""),
            "" if share is None else f"{100 * share:.1f} %",
        ])  # fmt: skip
    head = ["step", "seconds", "planned", "memory, MiB", "planned", "tokens", "joules", "processes", "type"]
    caption = (
        "Planned: as `lorapar plan` told before. Tokens: trained on, prompts too, or written by the model "
    )
    caption += "that is evaluated. Joules: of the GPUs, where they tell."
    return Grid([*head, "active elements"], rows, caption)


def tokens(artifact: Artifact) -> int | None:
    """What a training has read, or the model of an evaluation written; None where nothing tells."""
    history = artifact.path / "history.json"
    if history.is_file():
        read = [row["num_tokens"] for row in json.loads(history.read_bytes()) if "num_tokens" in row]
        return int(read[-1]) if read else None
    whole = artifact.manifest["summary"].get("all")
    if isinstance(whole, dict) and whole.get("tokens") is not None:
        return round(whole["tokens"] * whole["answers"])
    return None


def _rounded(value: float | None) -> str:
    return "" if value is None else f"{value:.0f}"


def settings(config: Config, found: dict[str, Artifact]) -> list[Part]:
    changed = [[name, json.dumps(value, ensure_ascii=False)] for name, value in _changed(config)]
    parts: list[Part] = [Grid(["setting", "value"], changed, "What differs from the defaults.", prose=True)]
    versions: dict[str, set[str]] = {}
    for artifact in found.values():
        for package, version in artifact.manifest["provenance"].get("versions", {}).items():
            versions.setdefault(package, set()).add(version)
    if versions:
        rows = [[package, ", ".join(sorted(numbers))] for package, numbers in sorted(versions.items())]
        parts.append(Details("Versions", [Grid(["package", "version"], rows)]))
    places = [[name, str(artifact.path)] for name, artifact in found.items()]
    return (
        [*parts, Details("Where the artifacts lie", [Grid(["step", "folder"], places, prose=True)])]
        if places
        else parts
    )


def _changed(section: Settings, prefix: str = "") -> list[tuple[str, Any]]:
    """Dotted name and value of each setting that is not the default."""
    changed: list[tuple[str, Any]] = []
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        default = None if field.is_required() else field.default
        if value == default:
            continue
        if isinstance(value, Settings) and (isinstance(default, Settings) or field.is_required()):
            changed += _changed(value, f"{prefix}{name}.")
        else:
            plain = section.model_dump(mode="json", exclude_defaults=True)
            changed.append((f"{prefix}{name}", plain.get(name)))
    return changed
