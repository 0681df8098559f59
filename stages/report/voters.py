"""The votes of a classify artifact as a table, for the terminal and the page."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, NonNegativeInt

from stages.records import read_json
from stages.report.comparison import percent
from stages.report.page import Grid


class _Voter(BaseModel):
    system2_share: float | None
    held_out_auc: float | None
    held_out_interval: tuple[float, float] | None


class _Known(BaseModel):
    field: str
    agreement: float | None
    n: NonNegativeInt


class _Report(BaseModel):
    """Fields of report.json that are shown; classify/report.py writes them."""

    voters: dict[str, _Voter]
    known: _Known | None = None


def grid(folder: Path) -> Grid | None:
    """Tabulate report.json of a classify artifact; None if there is none, as where labels are random."""
    if not (folder / "report.json").is_file():
        return None
    report = read_json(folder / "report.json", _Report)
    rows = []
    for title, voter in report.voters.items():
        low, high = voter.held_out_interval or (0, 0)
        area = "–" if voter.held_out_auc is None else f"{voter.held_out_auc:.2f} [{low:.2f}–{high:.2f}]"
        rows.append([title, percent(voter.system2_share), area])
    known = report.known
    text = f"{percent(known.agreement)} % of {known.n} labels are those in {known.field}." if known else ""
    return Grid(["voter", "System 2, %", "held-out AUC"], rows, text)
