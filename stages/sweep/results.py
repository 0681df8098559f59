"""What stands in the cells of a table: means over seeds with intervals over items, and paired tests."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages.evaluation.metrics import accuracy_by_item, graded
from stages.evaluation.statistics import interval, paired_difference, paired_p
from stages.pipeline.state import state
from stages.records import Sample, read_samples
from stages.store.artifacts import Artifact, Store
from stages.sweep.file import FLEXIBLE, SYSTEMS, Column
from stages.sweep.table import Cell, Table

Shares = dict[str, float]
"""Item → its share of correct answers."""


@dataclass(frozen=True)
class Value:
    """One cell of the printed table: accuracies and differences are shares, other values as they are."""

    mean: float
    low: float | None
    """95 % interval over items, each with its mean over seeds; None for values of summaries."""
    high: float | None
    n: int | None
    """Items."""
    of_seeds: list[float]
    p: float | None = None
    """Of a difference: that of a paired test."""


@dataclass(frozen=True)
class Comparison:
    """A row less the row that it is compared with, on the same items and seeds."""

    mean: float
    low: float
    high: float
    p: float
    n: int
    of_seeds: list[float]


class Artifacts:
    """The artifacts of cells' steps. One store for each run remembers what it has verified."""

    def __init__(self) -> None:
        self._stores: dict[Path, Store] = {}

    def store(self, cell: Cell) -> Store:
        return self._stores.setdefault(cell.config.root, Store(cell.config.root))

    def current(self, cell: Cell, step: str) -> Artifact | None:
        """None if the cell has no such step, or its artifact is not current."""
        if step not in cell.steps:
            return None
        now = state(self.store(cell), cell.steps[step])
        return now.artifact if now.state == "current" else None


@dataclass(frozen=True)
class Results:
    table: Table
    values: dict[tuple[str, str], Value | None]
    """By row and column: None while an artifact of it is missing, no entry where there is nothing to show."""
    comparisons: dict[str, Comparison | None]
    """By row, where the table compares, as in `values`; without the row that the others are compared with."""
    artifacts: Artifacts
    """What the values were read from."""
    missing: dict[tuple[str, str], list[int]]
    """By row and column, where a value is None: the seeds of which an artifact is missing."""


def results(table: Table) -> Results:
    reader = _Reader()
    values: dict[tuple[str, str], Value | None] = {}
    missing = {}
    for row in table.rows:
        cells = [cell for cell in table.cells if cell.row == row]
        for name in table.file.columns:
            if all(name in cell.columns for cell in cells):
                with suppress(_NothingToShow):
                    values[row, name] = reader.value(cells, name)
                if (row, name) in values and values[row, name] is None:
                    missing[row, name] = [cell.seed for cell in cells if reader.lacks(cell, name)]
    comparisons = {}
    if compare := table.file.compare:
        first = [cell for cell in table.cells if cell.row == table.against]
        for row in table.rows:
            cells = [cell for cell in table.cells if cell.row == row]
            if first and row != table.against and all(compare.on in cell.columns for cell in first + cells):
                with suppress(_NothingToShow):
                    comparisons[row] = reader.comparison(first, cells, compare.on)
    return Results(table, values, comparisons, reader.artifacts, missing)


class _NothingToShow(Exception):
    """The artifacts are there, and have no such value, or no item in common."""


class _Reader:
    def __init__(self) -> None:
        self.answers: dict[tuple[str, str], Shares] = {}
        self.artifacts = Artifacts()

    def _artifact(self, cell: Cell, column: Column) -> Artifact | None:
        return self.artifacts.current(cell, column.step)

    def lacks(self, cell: Cell, name: str) -> bool:
        """Whether an artifact of a column is missing."""
        return any(self._artifact(cell, part) is None for part in cell.columns[name].parts)

    def value(self, cells: list[Cell], name: str) -> Value | None:
        """None if the artifact of a seed is missing."""
        column = cells[0].columns[name]
        found = [self._artifact(cell, column) for cell in cells]
        unique = {a.manifest["key"]: a for a in found if a is not None}  # what no seed changes counts once
        if None in found:
            return None
        if not column.graded:
            numbers = [_number(artifact, column) for artifact in unique.values()]
            return Value(statistics.fmean(numbers), None, None, None, numbers)
        if column.less:
            return self._difference(cells, column, column.less)
        of_seeds = [self._shares(artifact, column) for artifact in unique.values()]
        items = _mean(of_seeds)
        if not items:
            raise _NothingToShow
        low, high = interval(list(items.values()))
        means = [statistics.fmean(part.values()) for part in of_seeds]
        return Value(statistics.fmean(items.values()), low, high, len(items), means)

    def _difference(self, cells: list[Cell], column: Column, less: Column) -> Value | None:
        """Of two accuracies of the same row and seed."""
        pairs = [(self._artifact(cell, less), self._artifact(cell, column)) for cell in cells]
        before = [self._shares(one, less) for one, _ in pairs if one]
        after = [self._shares(two, column) for _, two in pairs if two]
        if len(before) < len(cells) or len(after) < len(cells):
            return None
        found = _paired(before, after)
        return Value(found.mean, found.low, found.high, found.n, found.of_seeds, found.p)

    def comparison(self, first: list[Cell], other: list[Cell], name: str) -> Comparison | None:
        """Over the items that were graded for both, in the seeds that both have."""
        before, after = [], []
        for one in first:
            for two in other:
                if one.seed == two.seed:
                    pair = self._artifact(one, one.columns[name]), self._artifact(two, two.columns[name])
                    if pair[0] is None or pair[1] is None:
                        return None
                    before.append(self._shares(pair[0], one.columns[name]))
                    after.append(self._shares(pair[1], two.columns[name]))
        return _paired(before, after)

    def _shares(self, artifact: Artifact, column: Column) -> Shares:
        place = (str(artifact.path), column.rest)
        if place not in self.answers:
            self.answers[place] = accuracy_by_item(answers(artifact, column), reading(column))
        return self.answers[place]


def reading(column: Column) -> str:
    """The field of a sample that says whether it is right."""
    return "correct_flexible" if column.rest == FLEXIBLE else "correct"


def answers(artifact: Artifact, column: Column) -> dict[str, list[Sample]]:
    """Of each item of the column's group, those that count."""
    wanted = group("" if column.rest == FLEXIBLE else column.rest)
    return graded([sample for sample in read_samples(artifact.path / "samples.jsonl") if wanted(sample)])


def group(text: str) -> Callable[[Sample], bool]:
    """Whether a sample is in a group: `` is all, `system1` a label, `field=value` a field of the items."""
    if not text:
        return lambda sample: True
    if text in SYSTEMS:
        return lambda sample: sample.system == int(text[-1])
    name, _, value = text.partition("=")
    return lambda sample: str(sample.extra.get(name)) == value


def _paired(before: list[Shares], after: list[Shares]) -> Comparison:
    """Lists by seed; _NothingToShow if no item is in all of them."""
    earlier, later = _mean(before), _mean(after)
    both = [item for item in later if item in earlier]
    if not both:
        raise _NothingToShow
    pairs = [earlier[item] for item in both], [later[item] for item in both]
    mean, low, high = paired_difference(*pairs)
    alone = [_of_both(one, two) for one, two in zip(before, after, strict=True)]
    return Comparison(mean, low, high, paired_p(*pairs), len(both), alone)


def _of_both(one: Shares, two: Shares) -> float:
    """The mean difference of the items that are in both."""
    return statistics.fmean(two[item] - share for item, share in one.items() if item in two)


def _mean(parts: list[Shares]) -> Shares:
    """The mean of each item that is in all parts."""
    common = [item for item in parts[0] if all(item in part for part in parts)] if parts else []
    return {item: statistics.fmean(part[item] for part in parts) for item in common}


def _number(artifact: Artifact, column: Column) -> float:
    value: Any = artifact.manifest["summary"]
    for part in column.rest.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    if not isinstance(value, int | float):
        raise _NothingToShow
    return float(value)
