"""The page of one or several tables of many runs, its grids with their legend, and tables as CSV."""

import csv
import io
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from stages import escaping
from stages.evaluation.statistics import Interval, p_value
from stages.report import elements, figures
from stages.report.page import Block, Grid, PageSection, Picture, Text, render
from stages.store.artifacts import Artifact
from stages.sweep.file import FLEXIBLE, Column, Plot
from stages.sweep.results import OVER, Results
from stages.sweep.values import Value

NUMBERS = (
    "Accuracies are in %, by the strict reading, averaged over seeds; differences in points, on the same "
    "items and seeds. 95 % intervals without a name are over items, with the training seeds as they are; "
    "others are over seeds, by Student's t. p over items is from an exact permutation test, p over seeds "
    "from a paired t test. By Holm: corrected for the number of comparisons."
)


def page(tables: list[tuple[Results, str]]) -> str:
    """Render the page. tables: each with the command that makes or completes it."""
    sections = [_section(results, command) for results, command in tables]
    verdicts = [(section.title, _verdict(each)) for section, (each, _) in zip(sections, tables, strict=True)]
    if len(tables) == 1:
        ((title, verdict),) = verdicts
        return render(title, [verdict] if verdict else [], [replace(sections[0], title="Results")])
    lead = [f"{title}: {verdict}" for title, verdict in verdicts if verdict]
    return render("lorapar: tables", lead, sections)


def _verdict(results: Results) -> str:
    """Say in sentences which compared rows differ, over items and over seeds."""
    compared = {contrast: value for contrast, value in results.comparisons.items() if value is not None}
    if not compared:
        return ""
    planned = len(results.comparisons)
    sentences = [f"{len(compared)} of {planned} comparisons are complete."] if len(compared) < planned else []
    for over in OVER:
        scope = over.replace("_", " ").capitalize()
        p_values = results.corrected_p(over)
        told_apart = [
            f"{contrast.title} {100 * compared[contrast].mean:+.1f} ({p_value(p)})"
            for contrast, p in p_values.items()
            if p < 0.05
        ]
        if told_apart:
            sentences.append(f"{scope}, told apart from chance, in points: {'; '.join(told_apart)}.")
        elif p_values:
            sentences.append(f"{scope}, no difference is told apart from chance.")
    sentences.append("All p are corrected for the number of comparisons by Holm's method.")
    return " ".join(sentences)


def _section(results: Results, command: str) -> PageSection:
    file = results.table.file
    blocks: list[Block] = [Text(file.notes.strip())] if file.notes else []
    blocks.append(grid(results))
    if comparisons := comparison_grid(results):
        blocks.append(comparisons)
    if file.chosen_on:
        blocks.append(Text(f"Choices made on items: {file.chosen_on.strip()}", quiet=True))
    blocks += _line_plot(results, file.plot) if file.plot else []
    blocks += _importance(results) if file.importance else []
    blocks += [Text("This command makes or completes the table:", quiet=True), Text(command, "pre")]
    return PageSection(re.sub(r"\W+", "-", results.table.path.stem), file.title, blocks)


def _line_plot(results: Results, plot: Plot) -> Iterator[Picture]:
    """Plot one column over another; nothing while there is nothing to plot.

    A row called `SERIES: NAME` is a point of that series, any other row a horizontal line.
    """
    series: dict[str, list[tuple[float, Value]]] = {}
    lines: dict[str, float] = {}
    for row in results.table.rows:
        x, y = results.values.get((row, plot.x)), results.values.get((row, plot.y))
        group, colon, _ = row.partition(": ")
        if y and y.n and colon and x:
            series.setdefault(group, []).append((100 * x.mean if x.n else x.mean, y))
        elif y and y.n and not colon:
            lines[row] = 100 * y.mean
    published: dict[str, list[tuple[float, float]]] = {}
    for row, values in results.table.file.paper.items():
        group, colon, _ = row.partition(": ")
        if row in results.table.rows and colon and {plot.x, plot.y} <= values.keys():
            published.setdefault(group, []).append((values[plot.x], values[plot.y]))
        elif row in results.table.rows and not colon and plot.y in values:
            lines[f"{row}, published"] = values[plot.y]
    if series:
        svg = figures.svg(figures.line_plot(series, published, lines, plot.x, f"{plot.y}, %"))
        text = f"{plot.y} over {plot.x} for {', '.join(series)}; the numbers are in the table above."
        yield Picture(svg, text, f"{plot.y} over {plot.x}, with 95 % intervals.")


def _importance(results: Results) -> Iterator[Block]:
    """Plot each row's importance, by system, from its first seed, and say how much other seeds share."""
    by_row: dict[str, list[tuple[Artifact, Artifact]]] = {}
    for cell in results.table.cells:
        score, masks = (results.artifacts.current(cell, step) for step in ("score", "partition:sft"))
        if score and masks and (score.path / "importance.safetensors").is_file():
            by_row.setdefault(cell.row, []).append((score, masks))
    for row, of_seeds in by_row.items():
        yield elements.importance_by_system(*of_seeds[0], row)
        if len(of_seeds) > 1:
            yield Text(elements.between_seeds([masks for _, masks in of_seeds]))


def grid(results: Results) -> Grid:
    table = results.table
    sizes = {
        name: {
            value.n for (_, column), value in results.values.items() if column == name and value and value.n
        }
        for name in table.file.columns
    }
    # The head has the number of items; if rows differ in it, their cells have it.
    head = [f"{name}, n {min(n)}" if len(n) == 1 else name for name, n in sizes.items()]
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
    """Explain the numbers: seeds, intervals, tests, and what is not as the columns say."""
    cells = results.table.cells
    seeds = ", ".join(dict.fromkeys(str(cell.seed) for cell in cells))
    replicates = len({cell.config.data.path for cell in cells if cell.row == cells[0].row}) > 1
    sentences = [f"Seeds {seeds}{', each with data of its own' if replicates else ''}.", NUMBERS]
    readings: dict[str, dict[str, bool]] = {}
    for cell in cells:
        for name, column in cell.columns.items():
            readings.setdefault(name, {})[cell.row] = column.qualifier == FLEXIBLE
    flexible = [
        name if all(of_rows.values()) else f"{name} of {row}"
        for name, of_rows in readings.items()
        for row in sorted(row for row, is_flexible in of_rows.items() if is_flexible)
    ]
    sentences += [f"By the flexible reading: {'; '.join(dict.fromkeys(flexible))}."] if flexible else []
    if base := results.table.base:
        sentences.append(f"All rows are of {base}, in place of the configs that the table names.")
    return " ".join(sentences)


def records(results: Results) -> Iterator[dict[str, Any]]:
    """Yield one for each value and each comparison; accuracies, also published ones, are in [0, 1]."""
    for (row, name), value in results.values.items():
        published = results.table.file.paper.get(row, {}).get(name)
        if published is not None and Column.from_text(results.table.file.columns[name]).graded:
            published = round(published / 100, 6)
        yield {"row": row, "column": name, "paper": published, **_numbers(results, value)}
    for contrast, value in results.comparisons.items():
        names = {"row": contrast.row, "column": f"{contrast.on}, minus {contrast.against!r}"}
        by_holm = {f"{over}_holm": results.corrected_p(over).get(contrast) for over in OVER}
        yield {**names, "paper": None, **_numbers(results, value), **by_holm}


def csv_text(results: Results) -> str:
    """Write the records; cells of what does not exist are empty."""
    out = io.StringIO()
    names = ["row", "column", "paper", *_numbers(results, None)]
    writer = csv.DictWriter(out, names, lineterminator="\n")
    writer.writeheader()
    for record in records(results):
        writer.writerow(record | {name: escaping.csv_cell(record[name]) for name in ("row", "column")})
    return out.getvalue()


def _numbers(results: Results, value: Value | None) -> dict[str, float | None]:
    """Return the mean, the mean of each seed, and the intervals; None for what does not exist."""
    seeds = dict.fromkeys(f"seed_{cell.seed}" for cell in results.table.cells)
    means = value.of_seeds if value else []
    of_seeds = means * len(seeds) if len(means) == 1 else means  # one of a step that depends on no seed
    numbers: dict[str, Any] = {"mean": getattr(value, "mean", None), "items": getattr(value, "n", None)}
    numbers |= {"seeds": len(means) or None, **seeds}
    if len(of_seeds) == len(seeds):
        numbers |= zip(seeds, of_seeds, strict=True)
    for over in OVER:
        interval = getattr(value, over, None)
        numbers |= {f"{over}_{end}": getattr(interval, end, None) for end in ("low", "high", "p", "holm")}
    return numbers
