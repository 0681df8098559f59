"""The voter report of a classify artifact, as tables and sentences for the terminal and the pages."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from stages import escaping
from stages.report.comparison import percent
from stages.report.page import Grid, Text

MAX_CONTESTED = 3


def blocks(folder: Path) -> list[Grid | Text]:
    """Read report.json of a classify artifact; nothing if there is none, as where labels are random."""
    if not (folder / "report.json").is_file():
        return []
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    parts: list[Grid | Text] = [_voters(report["voters"])]
    parts.append(Text("weight: share of the voter's probability that falls on its two words"))
    parts += [_pairs(report["agreement"])] if report["agreement"].get("pairs") else []
    parts += _reference(report["known"], report["voters"]) if report.get("known") else []
    parts += [Text("most contested:")] if report["contested"] else []
    for row in report["contested"][:MAX_CONTESTED]:
        values = ", ".join("–" if value is None else f"{value:.2f}" for value in row["votes"].values())
        prompt = escaping.one_line(" ".join(row["prompt"].split()))[:90]
        parts.append(Text(f"  System {row['system'] or '–'} from {values}: {prompt}"))
    return parts


def _voters(voters: dict[str, Any]) -> Grid:
    rows = [
        [
            title,
            f"{percent(voter['system2_share'])}%",
            str(voter["invalid"]),
            str(sum(voter["failed"].values())),
            f"{voter['threshold']:.3f}",
            _area(voter["held_out_auc"], voter["held_out_interval"]),
            "" if voter["mass_on_words"] is None else f"{voter['mass_on_words']:.1%}",
        ]
        for title, voter in voters.items()
    ]
    return Grid(["voter", "votes 2", "invalid", "failed", "threshold", "held-out AUC", "weight"], rows)


def _pairs(agreement: dict[str, Any]) -> Grid:
    rows = []
    for names, pair in agreement["pairs"].items():
        kappa = "–" if pair["kappa"] is None else f"{pair['kappa']:.2f}"
        if pair["interval"]:
            kappa += f" [{pair['interval'][0]:.2f}–{pair['interval'][1]:.2f}]"
        rows.append([names, f"{percent(pair['equal'])}%", kappa])
    if agreement["fleiss_kappa"] is not None and len(agreement["pairs"]) > 1:
        rows.append(["all, Fleiss' kappa", "", f"{agreement['fleiss_kappa']:.2f}"])
    return Grid(["pair of voters", "equal", "Cohen's kappa"], rows)


def _reference(reference: dict[str, Any], voters: dict[str, Any]) -> list[Grid | Text]:
    """Show the agreement with known labels, and the AUC of each voter and of scores without a model."""
    rows = [
        [title if title in voters else f"{title} (no model)", _area(*(area or (None, None)))]
        for title, area in reference["auc"].items()
    ]
    parts: list[Grid | Text] = [Grid([f"against {reference['field']}", "AUC [95 %]"], rows)]
    if reference["agreement"] is not None:
        low, high = reference["interval"]
        share = f"{percent(reference['agreement'])} % [{percent(low)}–{percent(high)}]"
        parts.append(Text(f"labels agree with {reference['field']}: {share} of {reference['n']}"))
    return parts


def _area(value: float | None, interval: Any) -> str:
    """Format an AUC, which is None if it could not be measured, and its interval (low, high)."""
    return "–" if value is None else f"{value:.2f} [{interval[0]:.2f}–{interval[1]:.2f}]"
