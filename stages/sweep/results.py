"""Values of a table's cells: means over seeds, 95 % intervals over items, and paired tests."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages.evaluation.metrics import accuracy_by_item, answers_by_item
from stages.evaluation.statistics import interval, paired_difference, paired_p
from stages.pipeline.state import state
from stages.records import Sample, read_samples
from stages.store.artifacts import Artifact, Store
from stages.sweep.file import FLEXIBLE, SYSTEMS, Column
from stages.sweep.table import Cell, Table

ItemAccuracy = dict[str, float]
"""Item id → share of correct answers."""


@dataclass(frozen=True)
class Value:
    """A value of the printed table: accuracies and differences in [0, 1], other values as they are."""

    mean: float
    low: float | None
    """95 % interval over items, each averaged over seeds; None for values of summaries."""
    high: float | None
    n: int | None
    """Number of items; None for values of summaries."""
    of_seeds: list[float]
    p: float | None = None
    """p-value of the paired test, if this is a difference."""


@dataclass(frozen=True)
class Comparison:
    """Difference of a row from the row that it is compared with, on the same items and seeds."""

    mean: float
    low: float
    high: float
    p: float
    n: int
    of_seeds: list[float]


class Artifacts:
    """Finds the artifacts of cells' steps, with one store per run, which caches what it has verified."""

    def __init__(self) -> None:
        self._stores: dict[Path, Store] = {}

    def store(self, cell: Cell) -> Store:
        return self._stores.setdefault(cell.config.root, Store(cell.config.root))

    def current(self, cell: Cell, step: str) -> Artifact | None:
        """Return a step's artifact; None if the cell has no such step, or the artifact is not current."""
        if step not in cell.steps:
            return None
        now = state(self.store(cell), cell.steps[step])
        return now.artifact if now.state == "current" else None


@dataclass(frozen=True)
class Results:
    table: Table
    values: dict[tuple[str, str], Value | None]
    """Row, column → value; None if one of its artifacts is missing, no entry if there is nothing to show."""
    comparisons: dict[str, Comparison | None]
    """Row → comparison, with None as in `values`; without the row that the rows are compared with."""
    artifacts: Artifacts
    """Artifacts that the values were read from."""
    missing: dict[tuple[str, str], list[int]]
    """Row, column of each None in `values` → the seeds whose artifact is missing."""

    @property
    def any_there(self) -> bool:
        """True if a value is there, or would be with fewer seeds."""
        seeds = len({cell.seed for cell in self.table.cells})
        incomplete = any(len(missing) < seeds for missing in self.missing.values())
        return incomplete or any(value is not None for value in self.values.values())


def results(table: Table) -> Results:
    """Read all values and comparisons of a table from its artifacts."""
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
        references = [cell for cell in table.cells if cell.row == table.against]
        for row in table.rows:
            cells = [cell for cell in table.cells if cell.row == row]
            comparable = all(compare.on in cell.columns for cell in references + cells)
            if references and row != table.against and comparable:
                with suppress(_NothingToShow):
                    comparisons[row] = reader.comparison(references, cells, compare.on)
    return Results(table, values, comparisons, reader.artifacts, missing)


class _NothingToShow(Exception):
    """All artifacts exist, but lack the value or have no item in common."""


class _Reader:
    def __init__(self) -> None:
        self.accuracies: dict[tuple[str, str], ItemAccuracy] = {}
        """Artifact path, qualifier of the column → accuracy of each item."""
        self.artifacts = Artifacts()

    def _artifact(self, cell: Cell, column: Column) -> Artifact | None:
        return self.artifacts.current(cell, column.step)

    def lacks(self, cell: Cell, name: str) -> bool:
        """True if an artifact of the column is missing."""
        return any(self._artifact(cell, term) is None for term in cell.columns[name].terms)

    def value(self, cells: list[Cell], name: str) -> Value | None:
        """Return a column's value over the cells of one row; None if the artifact of a seed is missing."""
        column = cells[0].columns[name]
        artifacts = [self._artifact(cell, column) for cell in cells]
        # Seeds that share an artifact, because the step does not depend on the seed, count once.
        unique = {a.manifest["key"]: a for a in artifacts if a is not None}
        if None in artifacts:
            return None
        if not column.graded:
            numbers = [_number(artifact, column) for artifact in unique.values()]
            return Value(statistics.fmean(numbers), None, None, None, numbers)
        if column.minus:
            return self._difference(cells, column, column.minus)
        by_seed = [self._item_accuracy(artifact, column) for artifact in unique.values()]
        items = _mean_by_item(by_seed)
        if not items:
            raise _NothingToShow
        low, high = interval(list(items.values()))
        seed_means = [statistics.fmean(accuracy.values()) for accuracy in by_seed]
        return Value(statistics.fmean(items.values()), low, high, len(items), seed_means)

    def _difference(self, cells: list[Cell], column: Column, minus: Column) -> Value | None:
        """Return `column` - `minus`, paired by seed and item; None if an artifact is missing."""
        pairs = [(self._artifact(cell, minus), self._artifact(cell, column)) for cell in cells]
        first = [self._item_accuracy(artifact, minus) for artifact, _ in pairs if artifact]
        second = [self._item_accuracy(artifact, column) for _, artifact in pairs if artifact]
        if len(first) < len(cells) or len(second) < len(cells):
            return None
        paired = _paired(first, second)
        return Value(paired.mean, paired.low, paired.high, paired.n, paired.of_seeds, paired.p)

    def comparison(self, references: list[Cell], cells: list[Cell], name: str) -> Comparison | None:
        """Compare two rows on a column, over the items and seeds that both have; None if one is missing."""
        first, second = [], []
        for reference in references:
            for cell in cells:
                if reference.seed == cell.seed:
                    columns = reference.columns[name], cell.columns[name]
                    artifacts = self._artifact(reference, columns[0]), self._artifact(cell, columns[1])
                    if artifacts[0] is None or artifacts[1] is None:
                        return None
                    first.append(self._item_accuracy(artifacts[0], columns[0]))
                    second.append(self._item_accuracy(artifacts[1], columns[1]))
        return _paired(first, second)

    def _item_accuracy(self, artifact: Artifact, column: Column) -> ItemAccuracy:
        key = (str(artifact.path), column.qualifier)
        if key not in self.accuracies:
            self.accuracies[key] = accuracy_by_item(answers(artifact, column), reading(column))
        return self.accuracies[key]


def reading(column: Column) -> str:
    """Return the field of a sample that says whether it is correct."""
    return "correct_flexible" if column.qualifier == FLEXIBLE else "correct"


def answers(artifact: Artifact, column: Column) -> dict[str, list[Sample]]:
    """Map each item of the column's group to its answers, without items that have a refused answer."""
    in_group = group_filter("" if column.qualifier == FLEXIBLE else column.qualifier)
    return answers_by_item(
        [sample for sample in read_samples(artifact.path / "samples.jsonl") if in_group(sample)]
    )


def group_filter(group: str) -> Callable[[Sample], bool]:
    """Return a predicate for the samples of a group: empty for all, a label (`system1`) or `field=value`."""
    if not group:
        return lambda sample: True
    if group in SYSTEMS:
        return lambda sample: sample.system == int(group[-1])
    name, _, value = group.partition("=")
    return lambda sample: str(sample.extra.get(name)) == value


def _paired(first: list[ItemAccuracy], second: list[ItemAccuracy]) -> Comparison:
    """Test `second` - `first`, both lists by seed, on the items that are graded in every seed of both.

    Each item is averaged over seeds before the test, so n is the number of items. Raises _NothingToShow if
    there is no such item.
    """
    first_means, second_means = _mean_by_item(first), _mean_by_item(second)
    common = [item for item in second_means if item in first_means]
    if not common:
        raise _NothingToShow
    pairs = [first_means[item] for item in common], [second_means[item] for item in common]
    mean, low, high = paired_difference(*pairs)
    of_seeds = [_mean_difference(a, b) for a, b in zip(first, second, strict=True)]
    return Comparison(mean, low, high, paired_p(*pairs), len(common), of_seeds)


def _mean_difference(first: ItemAccuracy, second: ItemAccuracy) -> float:
    """Return the mean of `second` - `first` over the items of both."""
    return statistics.fmean(second[item] - accuracy for item, accuracy in first.items() if item in second)


def _mean_by_item(by_seed: list[ItemAccuracy]) -> ItemAccuracy:
    """Average each item over seeds; only items that every seed has."""
    common = [item for item in by_seed[0] if all(item in seed for seed in by_seed)] if by_seed else []
    return {item: statistics.fmean(seed[item] for seed in by_seed) for item in common}


def _number(artifact: Artifact, column: Column) -> float:
    """Return the number at the column's dotted path in the summary; _NothingToShow if there is none."""
    value: Any = artifact.manifest["summary"]
    for key in column.qualifier.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    if not isinstance(value, int | float):
        raise _NothingToShow
    return float(value)
