"""Results as a table of plain data, which the terminal, the pages and the model cards draw."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from stages import escaping
from stages.evaluation.statistics import p_value

ACCURACY = ("accuracy", "low", "high", "p")


@dataclass(frozen=True)
class ResultsCell:
    """A number, None if there is none, with the ends of its interval and its p-value where they exist."""

    value: float | None
    low: float | None = None
    high: float | None = None
    p: float | None = None
    share: bool = field(default=True, kw_only=True)
    """True for shares of 1, which are shown in percent; other numbers are rounded to integers."""

    def text(self, to: str = ", ", before_p: str = ", ") -> str:
        """Format the cell, as in `27.1 [24.0, 30.4], p = .2`. to: separates the ends of the interval."""
        if self.value is None:
            return "–"
        text = f"{100 * self.value:.1f}" if self.share else f"{self.value:.0f}"
        if self.low is not None and self.high is not None:
            text += f" [{100 * self.low:.1f}{to}{100 * self.high:.1f}]"
        return text if self.p is None else f"{text}{before_p}{p_value(self.p)}"


@dataclass(frozen=True)
class ResultsTable:
    columns: list[str]
    rows: list[tuple[str, list[ResultsCell | None]]]
    """Name, and a cell for each column after the first; None leaves a column blank."""

    def texts(self, to: str = ", ", before_p: str = ", ") -> list[list[str]]:
        """Format every row, its name first; the parameters are those of `ResultsCell.text`."""
        return [[name, *(c.text(to, before_p) if c else "" for c in cells)] for name, cells in self.rows]

    def markdown(self) -> str:
        lines = [list(map(escaping.markdown, self.columns))]
        lines += [[escaping.markdown(name), *cells] for name, *cells in self.texts()]
        head, *rows = (f"| {' | '.join(line)} |" for line in lines)
        return "\n".join([head, "|" + "---|" * len(self.columns), *rows])


def build(benchmark: str, measurements: list[dict[str, Any]], details: bool = False) -> ResultsTable:
    """Arrange a benchmark's measurements from `comparison.tables`: a column for each target.

    The first rows are accuracies, one for each group of items, and they alone have a number of items. Then
    come mean answer lengths and, with `details`, the flexible reading and counts of unusable answers.
    """
    groups: dict[str, dict[str, dict[str, Any]]] = {}
    for row in measurements:
        groups.setdefault(row["group"], {})[row["target"]] = row
    overall = groups.get("all", {})  # every target is in this group
    rows: list[tuple[str, list[ResultsCell | None]]] = []
    for group, by_target in groups.items():
        n = ResultsCell(max(row["n"] for row in by_target.values()), share=False)
        columns = [by_target.get(target, {}) for target in overall]
        rows.append((group, [n, *(ResultsCell(*map(row.get, ACCURACY)) for row in columns)]))
    for group, by_target in groups.items():
        lengths = [by_target.get(target, {}).get("tokens") for target in overall]
        if any(length is not None for length in lengths):
            rows.append((f"tokens, {group}", [None, *(ResultsCell(n, share=False) for n in lengths)]))
    if details and any(row["flexible"] != row["accuracy"] for row in overall.values()):
        rows.append(("all, flexible", [None, *(ResultsCell(row["flexible"]) for row in overall.values())]))
    for outcome in ("unparsed", "truncated", "refused") if details else ():
        if any(counts := [row[outcome] for row in overall.values()]):
            rows.append((f"  {outcome}", [None, *(ResultsCell(n, share=False) for n in counts)]))
    return ResultsTable([benchmark, "n", *overall], rows)
