"""Values of a table's cells and comparisons, read from its artifacts."""

import itertools
import json
import logging
import statistics
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

from stages.evaluation.metrics import accuracy_by_item, answers_by_item
from stages.evaluation.statistics import Interval, holm, over_replicates
from stages.pipeline.state import current_artifact, leaves
from stages.records import Sample, read_samples
from stages.store.artifacts import Artifact, Store
from stages.sweep.file import FLEXIBLE, SYSTEMS, Column
from stages.sweep.table import Cell, Contrast, Table
from stages.sweep.values import ItemAccuracy, NothingToShow, Value, accuracy, difference

log = logging.getLogger(__name__)

Over = Literal["over_items", "over_seeds"]
OVER: tuple[Over, ...] = get_args(Over)
"""Intervals of a `Value` that have a p-value if it is a difference."""


class Artifacts:
    """Finds the artifacts of cells' steps, with one store per run, which caches what it has verified."""

    def __init__(self) -> None:
        self._stores: dict[Path, Store] = {}
        self._accuracies: dict[tuple[Path, str], ItemAccuracy] = {}
        """Artifact, qualifier of the column → accuracy of each item."""

    def current(self, cell: Cell, step: str) -> Artifact | None:
        """Return a step's artifact; None if the cell has no such step, or the artifact is not current."""
        store = self._stores.setdefault(cell.config.root, Store(cell.config.root))
        return current_artifact(store, cell.steps[step]) if step in cell.steps else None

    def needed(self, cell: Cell, name: str) -> Artifact:
        """Return the artifact of a column, which must be current."""
        artifact = self.current(cell, cell.columns[name].step)
        assert artifact is not None
        return artifact

    def accuracy(self, cell: Cell, name: str) -> ItemAccuracy:
        """Return the accuracy of each item in a column whose artifact is current."""
        artifact, column = self.needed(cell, name), cell.columns[name]
        key = (artifact.path, column.qualifier)
        if key not in self._accuracies:
            samples = read_samples(artifact.path / "samples.jsonl")
            items = answers_by_item([s for s in samples if _is_in_group(s, column.qualifier)])
            reading = "correct_flexible" if column.qualifier == FLEXIBLE else "correct"
            self._accuracies[key] = accuracy_by_item(items, reading)
        return self._accuracies[key]


@dataclass(frozen=True)
class Results:
    table: Table
    values: dict[tuple[str, str], Value | None]
    """Row, column → value; None if one of its artifacts is missing, no entry if there is nothing to show."""
    comparisons: dict[Contrast, Value | None]
    """Contrast → difference of its rows on the same items and seeds, with None as in `values`."""
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

    def corrected_p(self, over: Over) -> dict[Contrast, float]:
        """Map each comparison that has a p-value over items or seeds to that p-value, corrected by Holm.

        A comparison without a p-value counts as one with p = 1: it is still missing, or the same in all
        seeds. So the corrected p-values of the others are upper bounds.
        """
        p_values = {}
        for contrast, value in self.comparisons.items():
            interval: Interval | None = getattr(value, over, None)
            if interval is not None and interval.p is not None:
                p_values[contrast] = interval.p
        others = len(self.comparisons) - len(p_values)
        corrected = holm([*p_values.values(), *[1.0] * others])
        return dict(zip(p_values, corrected, strict=False))  # the others come last


def results(table: Table) -> Results:
    """Read what the artifacts of a table say; a column without a value in any summary is warned of."""
    artifacts = Artifacts()
    values: dict[tuple[str, str], Value | None] = {}
    missing: dict[tuple[str, str], list[int]] = {}
    for row, name in itertools.product(table.rows, table.file.columns):
        cells = table.cells_of(row)
        if not all(name in cell.columns for cell in cells):
            continue
        if lacking := [cell.seed for cell in cells if not artifacts.current(cell, cell.columns[name].step)]:
            values[row, name], missing[row, name] = None, lacking
            continue
        try:
            values[row, name] = _value(artifacts, cells, name)
        except NothingToShow as nothing:
            shown = table.file.columns[name]
            log.warning("%s: column %r has nothing to show: %s%s", row, name, shown, nothing)
    comparisons: dict[Contrast, Value | None] = {}
    for contrast in table.contrasts:
        reference, cells = table.cells_of(contrast.against), table.cells_of(contrast.row)
        if {(contrast.against, contrast.on), (contrast.row, contrast.on)} & missing.keys():
            comparisons[contrast] = None
        elif all(contrast.on in cell.columns for cell in reference + cells):
            first, second = (
                [artifacts.accuracy(cell, contrast.on) for cell in side] for side in (reference, cells)
            )
            with suppress(NothingToShow):
                comparisons[contrast] = difference(first, second, _have_own_items(cells, contrast.on))
    return Results(table, values, comparisons, artifacts, missing)


def _value(artifacts: Artifacts, cells: list[Cell], name: str) -> Value:
    """Return a column's value over the cells of one row, whose artifacts are current."""
    # Seeds that share an artifact, because the step does not depend on the seed, count once.
    unique = {artifacts.needed(cell, name).manifest["key"]: cell for cell in cells}.values()
    if cells[0].columns[name].graded:
        by_seed = [artifacts.accuracy(cell, name) for cell in unique]
        return accuracy(by_seed, _have_own_items(cells, name))
    of_seeds = [_number(artifacts.needed(cell, name), cell.columns[name]) for cell in unique]
    spread = over_replicates(of_seeds)  # its p-value is of a mean of 0
    return Value(statistics.fmean(of_seeds), of_seeds, over_seeds=spread and replace(spread, p=None))


def _is_in_group(sample: Sample, group: str) -> bool:
    """Whether a sample is of the items of a column: all, a label's (`system1`), or those of `field=value`."""
    if group in ("", FLEXIBLE):
        return True
    if group in SYSTEMS:
        return sample.system == int(group[-1])
    name, _, value = group.partition("=")
    field = sample.extra.get(name)
    return value in (str(field), json.dumps(field))  # in JSON Lines a boolean is `true`


def _have_own_items(cells: list[Cell], name: str) -> bool:
    """True if the seeds of a row are evaluated on different items in this column."""
    benchmarks = (cell.config.eval.benchmarks[cell.columns[name].step.partition("@")[2]] for cell in cells)
    return len({(source.path, source.subset, source.split) for source in benchmarks}) > 1


def _number(artifact: Artifact, column: Column) -> float:
    """Return the number at the column's dotted path in the summary; NothingToShow if there is none."""
    numbers = {k: v for k, v in leaves(artifact.manifest["summary"]).items() if isinstance(v, int | float)}
    if column.qualifier not in numbers:
        raise NothingToShow(f"; choose from: {', '.join(f'{column.step}.{name}' for name in numbers)}")
    return float(numbers[column.qualifier])
