"""A table of many runs as grids with their legend, as Markdown and as CSV."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator
from dataclasses import astuple

from stages import escaping
from stages.evaluation.statistics import Interval, p_value
from stages.report.page import Grid
from stages.sweep.file import FLEXIBLE, Column
from stages.sweep.results import OVER, Results
from stages.sweep.values import Value

OVER_ITEMS = (
    "95 % intervals without a name are over items, each averaged over seeds: they say what other items would "
    "show, with the training seeds as they are."
)
OVER_SEEDS = (
    "Intervals over seeds are by Student's t over the means of the seeds: they say what other seeds would "
    "show."
)
TESTED_OVER_ITEMS = (
    "p over items is from an exact permutation test of their mean (McNemar's where each item is right or "
    "wrong)."
)


def markdown(results: Results, command: str) -> str:
    """Write a section: title, notes, tables, what they say, and the command that makes missing cells."""
    file = results.table.file
    paragraphs = filter(None, re.split(r"\n\s*\n", file.notes.strip()))
    grids = filter(None, (grid(results), comparison_grid(results)))
    parts = [f"## {escaping.markdown(file.title)}", *map(escaping.markdown, paragraphs)]
    parts += [each.markdown() for each in grids]
    parts += [escaping.markdown(text) for text in (legend(results), choices_note(results)) if text]
    return "\n\n".join([*parts, escaping.markdown_code(command)]) + "\n"


def grid(results: Results) -> Grid:
    """Return the table of values."""
    table = results.table
    # The legend has the number of items. If columns differ in it, their heads have it, or else the cells.
    sizes = {
        name: {
            value.n for (_, column), value in results.values.items() if column == name and value and value.n
        }
        for name in table.file.columns
    }
    differ = len(set().union(*sizes.values())) > 1
    head = [f"{name}, n {min(n)}" if differ and len(n) == 1 else name for name, n in sizes.items()]
    rows = [
        [row, *(_cell(results, row, name, len(n) > 1) for name, n in sizes.items())] for row in table.rows
    ]
    return Grid(["", *head], rows, legend(results))


def _cell(results: Results, row: str, name: str, with_n: bool) -> str:
    if (row, name) not in results.values:
        return "–"
    value = results.values[row, name]
    published = results.table.file.paper.get(row, {}).get(name)
    paper = "" if published is None else f" (paper: {published:g})"
    if value is None:
        seeds = results.missing[row, name]
        some_there = {cell.seed for cell in results.table.cells} - set(seeds)
        return "missing" + (f" (seed {', '.join(map(str, seeds))})" if some_there else "") + paper
    first, *others = value.text().split("\n")
    items = f", n {value.n}" if with_n and value.n is not None else ""
    return "\n".join([first + items + paper, *others])


def comparison_grid(results: Results) -> Grid | None:
    """Return the table of comparisons, in percentage points, with the intervals that any of them has.

    None if nothing is compared, also because --only leaves out the row that others are compared with.
    """
    if not results.comparisons:
        return None
    compared = list(filter(None, results.comparisons.values()))
    scopes = [over for over in OVER if any(getattr(value, over) for value in compared)]
    corrected = {over: results.corrected_p(over) for over in scopes}
    head = ["comparison", "points", *(over.replace("_", " ") for over in scopes)]
    rows = []
    for contrast, value in results.comparisons.items():
        cells = ["missing", *[""] * len(scopes)]
        if value is not None:
            cells = [value.number(value.mean)]
            for over in scopes:
                interval: Interval | None = getattr(value, over)
                by_holm = corrected[over].get(contrast)
                cells.append(value.ends(interval) + (f"\nby Holm: {p_value(by_holm)}" if by_holm else ""))
        rows.append([contrast.title, *cells])
    return Grid(head, rows)


def legend(results: Results) -> str:
    """Explain the numbers: seeds, items, intervals and tests."""
    graded = [value for value in results.values.values() if value is not None and value.n is not None]
    compared = [value for value in results.comparisons.values() if value is not None]
    cells = results.table.cells
    seeds = list(dict.fromkeys(cell.seed for cell in cells))
    replicates = len({cell.config.data.path for cell in cells if cell.row == cells[0].row}) > 1
    sentences = [f"Seeds {', '.join(map(str, seeds))}{', each with data of its own' if replicates else ''}."]
    if graded:
        items = sorted({value.n for value in graded if value.n is not None})
        span = f"{items[0]}" if len(items) == 1 else f"{items[0]} to {items[-1]}"
        together = " of all seeds together" if any(value.over_items is None for value in graded) else ""
        sentences.append(
            f"Accuracies are in %, over {span} items{together} with strictly parsed answers, averaged over "
            "seeds."
        )
    flexible = sorted({
        f"{name} of {cell.row}"
        for cell in cells
        for name, column in cell.columns.items()
        if FLEXIBLE in {term.qualifier for term in column.terms}
    })  # fmt: skip
    sentences += [f"Parsed flexibly: {'; '.join(flexible)}."] if flexible else []
    sentences += _intervals(graded + compared)
    if any(map(results.corrected_p, OVER)):
        sentences.append("By Holm: corrected for the number of comparisons by Holm's method.")
    if results.table.base:
        sentences.append(
            f"All rows are of {results.table.base}, in place of the configs that the table names."
        )
    return " ".join(sentences)


def _intervals(values: list[Value]) -> Iterator[str]:
    """Explain the intervals and tests that these values have."""
    differences = [value for value in values if value.difference]
    sentences = (
        (any(value.over_items for value in values), OVER_ITEMS),
        (any(value.over_seeds for value in values), OVER_SEEDS),
        (differences, "Differences are in percentage points, on the same items and seeds."),
        (any(value.over_items for value in differences), TESTED_OVER_ITEMS),
        (any(value.over_seeds for value in differences), "p over seeds is from a paired t test."),
    )
    return (sentence for holds, sentence in sentences if holds)


def choices_note(results: Results) -> str:
    """Say which settings were chosen on which items, or return an empty text."""
    text = results.table.file.chosen_on.strip()
    return f"Choices made on items: {text}" if text else ""


def csv_text(results: Results) -> str:
    """Write one line per value and per comparison; accuracies, also published ones, are in [0, 1]."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    intervals = [f"{scope}_{end}" for scope in OVER for end in ("low", "high", "p")]
    writer.writerow(["row", "column", "paper", "mean", "items", "seeds", "of_seeds", *intervals])
    for (row, name), value in results.values.items():
        published = results.table.file.paper.get(row, {}).get(name)
        if published is not None and Column.from_text(results.table.file.columns[name]).graded:
            published = round(published / 100, 6)
        writer.writerow([*map(escaping.csv_cell, (row, name)), published, *_csv_numbers(value)])
    for contrast, value in results.comparisons.items():
        names = contrast.row, f"{contrast.on}, minus {contrast.against!r}"
        writer.writerow([*map(escaping.csv_cell, names), None, *_csv_numbers(value)])
    return out.getvalue()


def _csv_numbers(value: Value | None) -> list[float | str | None]:
    """Return the mean, its numbers and its intervals; the cells of numbers that do not exist are empty."""
    if value is None:
        return []
    intervals = (astuple(interval) if (interval := getattr(value, over)) else [None] * 3 for over in OVER)
    of_seeds = " ".join(f"{mean:.6g}" for mean in value.of_seeds)
    return [value.mean, value.n, len(value.of_seeds), of_seeds, *(end for ends in intervals for end in ends)]
