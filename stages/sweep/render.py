"""Renders a table of results as Markdown and CSV."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator
from dataclasses import astuple

from stages import escaping
from stages.evaluation.statistics import BOOTSTRAP_DRAWS, Interval, p_value
from stages.sweep.file import FLEXIBLE, Column
from stages.sweep.results import OVER, Results
from stages.sweep.table import Cell, Contrast
from stages.sweep.values import Value

OVER_ITEMS = (
    "95 % intervals without a name are over items, each averaged over seeds: they say what other items would "
    "show, with the training seeds as they are."
)
OVER_SEEDS = (
    "Intervals over seeds are by Student's t over the means of the seeds: they say what other seeds would "
    "show."
)
RESAMPLED = (
    f"The bootstrap draws seeds and, of each, items {BOOTSTRAP_DRAWS:,} times with replacement; with few "
    "seeds its interval is too narrow."
)
TESTED_OVER_ITEMS = (
    "p over items is from an exact permutation test of their mean (McNemar's where each item is right or "
    "wrong)."
)


def markdown(results: Results, command: str) -> str:
    """Render a section: title, notes, table, comparisons, legend and command.

    command: the command line that makes missing cells.
    """
    file = results.table.file
    paragraphs = [text for text in re.split(r"\n\s*\n", file.notes.strip()) if text]
    lines = [f"## {escaping.markdown(file.title)}", ""]
    lines += [line for text in paragraphs for line in (escaping.markdown(text), "")]
    for head, rows in filter(None, (grid(results), comparison_grid(results))):
        # Cells other than names are numbers, and words of our own.
        table = [list(map(escaping.markdown, head)), ["---"] * len(head)]
        table += [[escaping.markdown(row), *cells] for row, *cells in rows]
        lines += [*(f"| {' | '.join(cells)} |" for cells in table), ""]
    for text in filter(None, (legend(results), choices_note(results))):
        lines += [escaping.markdown(text), ""]
    return "\n".join([*lines, escaping.markdown_code(command), ""])


Texts = tuple[list[str], list[list[str]]]
"""Column heads, and rows of cells; the first cell of a row is its name."""


def grid(results: Results, separator: str = "; ") -> Texts:
    """Return the table of values. separator: between the intervals of a cell."""
    columns = results.table.file.columns
    # Numbers of items stand in the legend. If they differ, they stand in the heads, or else in the cells.
    sizes = {
        name: {v.n for (_, n), v in results.values.items() if n == name and v and v.n} for name in columns
    }
    differ = len(set().union(*sizes.values())) > 1
    in_head = {name for name in columns if differ and len(sizes[name]) == 1}
    in_cells = {name for name in columns if len(sizes[name]) > 1}
    head = [f"{name}, n {min(sizes[name])}" if name in in_head else name for name in columns]
    rows = [
        [row, *(_cell(results, row, name, name in in_cells, separator) for name in columns)]
        for row in results.table.rows
    ]
    return ["", *head], rows


def comparison_grid(results: Results) -> Texts | None:
    """Return the table of comparisons, in percentage points, with the intervals that any of them has.

    None if nothing is compared, also because --only leaves out the row that others are compared with.
    """
    if not results.comparisons:
        return None
    compared = list(filter(None, results.comparisons.values()))
    scopes = [over for over in OVER if any(getattr(value, over) for value in compared)]
    corrected = {over: results.corrected_p(over) for over in scopes}
    resampled = any(value.bootstrap for value in compared)
    several_seeds = any(len(value.of_seeds) > 1 for value in compared)
    head = ["comparison", "points"]
    for over in scopes:
        head += [over.replace("_", " "), "p", "by Holm"]
    head += ["bootstrap"] * resampled + ["by seed"] * several_seeds
    rows = []
    for contrast, value in results.comparisons.items():
        cells = ["missing", *[""] * (len(head) - 2)]
        if value is not None:
            cells = [value.number(value.mean)]
            for over in scopes:
                interval: Interval | None = getattr(value, over)
                cells += [value.ends(interval), _bare_p(interval.p if interval else None)]
                cells += [_bare_p(corrected[over].get(contrast))]
            cells += [value.ends(value.bootstrap)] * resampled
            cells += [", ".join(map(value.number, value.of_seeds))] * several_seeds
        rows.append([contrast_name(contrast), *cells])
    return head, rows


def contrast_name(contrast: Contrast) -> str:
    return f"{contrast.on}: {rows_name(contrast.rows)} minus {rows_name(contrast.against)}"


def rows_name(rows: tuple[str, ...]) -> str:
    """Quote a row, or name the mean of several."""
    return repr(rows[0]) if len(rows) == 1 else f"the mean of {', '.join(map(repr, rows))}"


def _cell(results: Results, row: str, name: str, with_n: bool, separator: str) -> str:
    if (row, name) not in results.values:
        return "–"
    value = results.values[row, name]
    published = results.table.file.paper.get(row, {}).get(name)
    paper = "" if published is None else f" (paper: {published:g})"
    if value is None:
        seeds = results.missing[row, name]
        some_there = {cell.seed for cell in results.table.cells} - set(seeds)
        return "missing" + (f" (seed {', '.join(map(str, seeds))})" if some_there else "") + paper
    first, *others = shown(value)
    items = f", n {value.n}" if with_n and value.n is not None else ""
    return separator.join([first + items + paper, *others])


def shown(value: Value) -> list[str]:
    """Write a value; intervals over seeds and of the bootstrap follow, each with its name."""
    texts = [value.text()]
    if seeds := value.over_seeds:
        p = "" if seeds.p is None else f", {p_value(seeds.p)}"
        texts.append(f"seeds {value.ends(seeds)}{p}")
    return [*texts, *([f"bootstrap {value.ends(value.bootstrap)}"] if value.bootstrap else [])]


def _bare_p(p: float | None) -> str:
    """Format a p-value for a column of its own: `.034` or `< .001`."""
    return "" if p is None else p_value(p).removeprefix("p ").removeprefix("= ")


def _parsed_flexibly(cells: list[Cell]) -> list[str]:
    """Name the values that are parsed flexibly; of a difference of unlike readings, which part is."""
    names = set()
    for cell, name, column in ((c, *item) for c in cells for item in c.columns.items()):
        flexible = [term.qualifier == FLEXIBLE for term in column.terms]
        part = f" (what is {'before' if flexible[0] else 'after'} the minus)"
        if any(flexible):
            names.add((cell.row, name, "" if all(flexible) else part))
    return [f"{name} of {row}{part}" for row, name, part in sorted(names)]


def legend(results: Results) -> str:
    """Explain the numbers: seeds, items, intervals and tests, and the rows that are left out."""
    graded = [v for v in results.values.values() if v is not None and v.n is not None]
    compared = [value for value in results.comparisons.values() if value is not None]
    cells = results.table.cells
    seeds = list(dict.fromkeys(cell.seed for cell in cells))
    replicates = len({cell.config.data.path for cell in cells if cell.row == cells[0].row}) > 1
    sentences = [f"Seeds {', '.join(map(str, seeds))}{', each with data of its own' if replicates else ''}."]
    if graded:
        items = sorted({v.n for v in graded if v.n is not None})
        span = f"{items[0]}" if len(items) == 1 else f"{items[0]} to {items[-1]}"
        together = " of all seeds together" if any(value.over_items is None for value in graded) else ""
        sentences.append(
            f"Accuracies are in %, over {span} items{together} with strictly parsed answers, averaged over "
            "seeds."
        )
    if flexible := _parsed_flexibly(cells):
        sentences.append(f"Parsed flexibly: {'; '.join(flexible)}.")
    sentences += _intervals(graded + compared)
    if any(map(results.corrected_p, OVER)):
        sentences.append("By Holm: corrected for the number of comparisons by Holm's method.")
    if results.table.rebased_rows:
        rows, base = results.table.rebased_rows, cells[0].base
        sentences.append(f"{base} replaces the configs that these rows name: {'; '.join(rows)}.")
    if results.table.duplicate_of:
        pairs = "; ".join(f"{row} (as {first})" for row, first in results.table.duplicate_of.items())
        sentences.append(f"Left out, because they are the same as another row here: {pairs}.")
    return " ".join(sentences)


def _intervals(values: list[Value]) -> Iterator[str]:
    """Explain the intervals and tests that these values have."""
    differences = [value for value in values if value.difference]
    sentences = (
        (any(value.over_items for value in values), OVER_ITEMS),
        (any(value.over_seeds for value in values), OVER_SEEDS),
        (any(value.bootstrap for value in values), RESAMPLED),
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
    """Render one line per value and per comparison; accuracies, also published ones, are in [0, 1]."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([
        "row", "column", "mean", "low", "high", "items", "seeds", "of_seeds", "paper", "p", "seeds_low",
        "seeds_high", "seeds_p", "bootstrap_low", "bootstrap_high",
    ])  # fmt: skip
    for (row, name), value in results.values.items():
        published: float | str = results.table.file.paper.get(row, {}).get(name, "")
        if published != "" and Column.from_text(results.table.file.columns[name]).graded:
            published = round(float(published) / 100, 6)
        writer.writerow([*map(escaping.csv_cell, (row, name)), *_csv_numbers(value, published)])
    for contrast, value in results.comparisons.items():
        if value is not None:
            row = contrast.rows[0] if len(contrast.rows) == 1 else rows_name(contrast.rows)
            names = row, f"{contrast.on}, minus {rows_name(contrast.against)}"
            writer.writerow([*map(escaping.csv_cell, names), *_csv_numbers(value, "")])
    return out.getvalue()


def _csv_numbers(value: Value | None, published: float | str) -> list[float | str]:
    """Return the cells of a line after row and column; those of numbers that do not exist are empty."""
    if value is None:
        return [*[""] * 6, published, *[""] * 6]
    intervals = (value.over_items, value.over_seeds, value.bootstrap)
    items, seeds, resampled = (astuple(interval) if interval else [None] * 3 for interval in intervals)
    of_seeds = " ".join(f"{mean:.6g}" for mean in value.of_seeds)
    numbers = [value.mean, *items[:2], value.n, len(value.of_seeds), of_seeds, published, items[2], *seeds]
    return ["" if number is None else number for number in [*numbers, *resampled[:2]]]
