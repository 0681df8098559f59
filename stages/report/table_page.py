"""The page of one or several tables of many runs."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Iterator

from stages.evaluation.statistics import p_value
from stages.report import elements, figures
from stages.report.page import (
    Block,
    Command,
    Grid,
    PageSection,
    Picture,
    Pictures,
    Text,
    render,
)
from stages.sweep import render as render_table
from stages.sweep.file import Plot
from stages.sweep.results import Over, Results
from stages.sweep.values import Value

SweepCommand = Callable[[str | None], str]
"""Writes the command that makes what is missing of a row, or, for None, of its table."""


def page(tables: list[tuple[Results, SweepCommand]]) -> str:
    titles = [results.table.file.title for results, _ in tables]
    verdicts = zip(titles, (_verdict(results) for results, _ in tables), strict=True)
    lead = [f"{title}. {verdict}" if len(titles) > 1 else verdict for title, verdict in verdicts if verdict]
    title = titles[0] if len(titles) == 1 else "lorapar: tables"
    return render(title, lead, [_section(results, command) for results, command in tables])


def _verdict(results: Results) -> str:
    """Say in sentences which compared rows differ, over items and over seeds."""
    compared = {contrast: value for contrast, value in results.comparisons.items() if value is not None}
    if not compared:
        return ""
    sentences = [_compared(results, len(compared))]
    one_pair = len({(contrast.against, contrast.on) for contrast in results.comparisons}) == 1
    scopes: dict[Over, str] = {
        "over_items": "Over items, with the training seeds as they are",
        "over_seeds": "Over seeds",
    }
    for over, scope in scopes.items():
        p_values = results.corrected_p(over)
        told_apart = [
            f"{render_table.rows_name(contrast.rows) if one_pair else render_table.contrast_name(contrast)} "
            f"{100 * compared[contrast].mean:+.1f} ({p_value(p)})"
            for contrast, p in p_values.items()
            if p < 0.05
        ]
        if told_apart:
            sentences.append(f"{scope}, told apart from chance, in points: {'; '.join(told_apart)}.")
        elif p_values:
            sentences.append(f"{scope}, no difference is told apart from chance.")
    if len(sentences) > 1:
        sentences.append("All p are corrected for the number of comparisons by Holm's method.")
    return " ".join(sentences)


def _compared(results: Results, number: int) -> str:
    """Say what is compared, and how many of the comparisons are complete: `number`."""
    pairs = {(contrast.against, contrast.on) for contrast in results.comparisons}
    if len(pairs) > 1 or any(len(contrast.rows) > 1 for contrast in results.comparisons):
        planned = len(results.comparisons)
        begin = f"All {planned}" if number == planned > 1 else f"{number} of {planned}"
        return f"{begin} planned comparisons {'is' if number == 1 else 'are'} complete."
    ((against, on),) = pairs
    candidates = sum(row not in against for row in results.table.rows)
    rows = "All other rows" if number == candidates else f"{number} of {candidates} other rows"
    verb = "is" if number == 1 < candidates else "are"
    return f"{rows} {verb} compared with {render_table.rows_name(against)} on {on}."


def _section(results: Results, command: SweepCommand) -> PageSection:
    file = results.table.file
    anchor = re.sub(r"\W+", "-", results.table.path.stem)
    blocks: list[Block] = [Text(file.notes.strip())] if file.notes else []
    blocks.append(Grid(*render_table.grid(results, separator="\n"), render_table.legend(results)))
    if comparisons := render_table.comparison_grid(results):
        blocks.append(Grid(*comparisons))
    if choices := render_table.choices_note(results):
        blocks.append(Text(choices, quiet=True))
    plot = _line_plot(results, file.plot) or _dot_plot(results)
    importance = list(_importance(results)) if file.importance else []
    blocks += [Pictures(row) for row in (plot, importance) if row]
    if file.make_data:
        blocks += [Text("This command writes the data of a seed:", quiet=True), Command(file.make_data)]
    blocks += [Text("This command makes or completes the table:", quiet=True), Command(command(None))]
    return PageSection(anchor, file.title, blocks)


def _dot_plot(results: Results) -> list[Picture]:
    """Plot accuracies by row; nothing while there is none."""
    file, rows = results.table.file, results.table.rows
    series: dict[str, dict[str, Value]] = {}
    for column, row in itertools.product(file.columns, rows):
        value = results.values.get((row, column))
        if value and value.n is not None and not value.difference:
            series.setdefault(column, {})[row] = value
    if not series:
        return []
    published = {
        column: {row: paper[column] for row, paper in file.paper.items() if column in paper and row in rows}
        for column in series
    }
    svg = figures.svg(figures.dot_plot(rows, series, published))
    text = f"Accuracies of {len(rows)} rows with 95 % intervals; the numbers are in the table above."
    scopes = _scopes(value for by_row in series.values() for value in by_row.values())
    return [Picture(svg, text, f"Accuracy with its 95 % interval over {scopes}.")]


def _scopes(values: Iterable[Value]) -> str:
    """Say what the intervals that figures draw are over."""
    return " or ".join(sorted({"items" if value.over_items else "seeds" for value in values}))


def _line_plot(results: Results, plot: Plot | None) -> list[Picture]:
    """Plot one column over another; nothing while there is nothing to plot.

    A row called `SERIES: NAME` is a point of that series, any other row a horizontal line.
    """
    if plot is None:
        return []
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
    if not series:
        return []
    svg = figures.svg(figures.line_plot(series, published, lines, plot.x, f"{plot.y}, %"))
    text = f"{plot.y} over {plot.x} for {', '.join(series)}; the numbers are in the table above."
    scopes = _scopes(y for points in series.values() for _, y in points)
    return [Picture(svg, text, f"{plot.y} over {plot.x}, with 95 % intervals over {scopes}.")]


def _importance(results: Results) -> Iterator[Picture]:
    """Plot each row's importance, by system and cumulative, from its first seed that has the artifacts."""
    drawn = set()
    for cell in results.table.cells:
        score, masks = (results.artifacts.current(cell, step) for step in ("score", "partition:sft"))
        if cell.row in drawn or not (score and masks and (score.path / "importance.safetensors").is_file()):
            continue
        drawn.add(cell.row)
        yield elements.importance_by_system(score, masks, cell.row)
