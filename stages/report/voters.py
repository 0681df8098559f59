"""The voter report of a classify artifact, as tables and sentences for the terminal and the pages."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, NonNegativeInt

from stages.records import read_json
from stages.report.comparison import percent
from stages.report.page import Grid, Text

Ends = tuple[float, float]
"""The ends of a 95 % interval."""


class _Voter(BaseModel):
    system2_share: float | None
    invalid: NonNegativeInt
    failed: dict[str, NonNegativeInt]
    threshold: float
    held_out_auc: float | None
    held_out_interval: Ends | None
    mass_on_words: float | None


class _Known(BaseModel):
    field: str
    auc: dict[str, tuple[float, Ends] | None]
    agreement: float | None
    interval: Ends | None
    n: NonNegativeInt


class _Report(BaseModel):
    """Fields of report.json that are shown; classify/report.py writes them."""

    voters: dict[str, _Voter]
    known: _Known | None = None


def blocks(folder: Path) -> list[Grid | Text]:
    """Read report.json of a classify artifact; nothing if there is none, as where labels are random."""
    if not (folder / "report.json").is_file():
        return []
    report = read_json(folder / "report.json", _Report)
    parts: list[Grid | Text] = [_voters(report.voters)]
    parts.append(Text("weight: share of the voter's probability that falls on its two words"))
    parts.append(Text("held-out AUC: on rows of known labels (classify.held_out), not on these"))
    parts += _reference(report.known) if report.known else []
    return parts


def _voters(voters: dict[str, _Voter]) -> Grid:
    rows = [
        [
            title,
            f"{percent(voter.system2_share)}%",
            str(voter.invalid),
            str(sum(voter.failed.values())),
            f"{voter.threshold:.3f}",
            _area(voter.held_out_auc, voter.held_out_interval),
            "" if voter.mass_on_words is None else f"{voter.mass_on_words:.1%}",
        ]
        for title, voter in voters.items()
    ]
    return Grid(["voter", "votes 2", "invalid", "failed", "threshold", "held-out AUC", "weight"], rows)


def _reference(reference: _Known) -> list[Grid | Text]:
    """Show the agreement with known labels, and the AUC of each voter."""
    rows = [[title, _area(*(area or (None, None)))] for title, area in reference.auc.items()]
    parts: list[Grid | Text] = [Grid([f"against {reference.field}", "AUC [95 %]"], rows)]
    if reference.interval:
        low, high = reference.interval
        share = f"{percent(reference.agreement)} % [{percent(low)}–{percent(high)}]"
        parts.append(Text(f"labels agree with {reference.field}: {share} of {reference.n}"))
    return parts


def _area(value: float | None, interval: Ends | None) -> str:
    """Format an AUC, which like its interval is None if it could not be measured."""
    return "–" if value is None or interval is None else f"{value:.2f} [{interval[0]:.2f}–{interval[1]:.2f}]"
