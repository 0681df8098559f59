"""The page of one or several tables of many runs."""

from __future__ import annotations

import re
from collections.abc import Iterator

from stages.evaluation.statistics import p_value
from stages.report import elements, figures
from stages.report import table_texts as texts
from stages.report.page import Block, Command, PageSection, Picture, Text, render
from stages.sweep.file import Plot
from stages.sweep.results import OVER, Results
from stages.sweep.values import Value


def page(tables: list[tuple[Results, str]]) -> str:
    """Render the page. tables: each with the command that makes or completes it."""
    titles = [results.table.file.title for results, _ in tables]
    verdicts = [_verdict(results) for results, _ in tables]
    lead = [f"{title}. {verdict}" for title, verdict in zip(titles, verdicts, strict=True) if verdict]
    title = titles[0] if len(titles) == 1 else "lorapar: tables"
    return render(title, lead, [_section(results, command) for results, command in tables])


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
    blocks.append(texts.grid(results))
    if comparisons := texts.comparison_grid(results):
        blocks.append(comparisons)
    if file.chosen_on:
        blocks.append(Text(f"Choices made on items: {file.chosen_on.strip()}", quiet=True))
    blocks += _line_plot(results, file.plot)
    blocks += _importance(results) if file.importance else []
    blocks += [Text("This command makes or completes the table:", quiet=True), Command(command)]
    return PageSection(re.sub(r"\W+", "-", results.table.path.stem), file.title, blocks)


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
    return [Picture(svg, text, f"{plot.y} over {plot.x}, with 95 % intervals.")]


def _importance(results: Results) -> Iterator[Picture]:
    """Plot each row's importance, by system, from its first seed that has the artifacts."""
    drawn = set()
    for cell in results.table.cells:
        score, masks = (results.artifacts.current(cell, step) for step in ("score", "partition:sft"))
        if cell.row in drawn or not (score and masks and (score.path / "importance.safetensors").is_file()):
            continue
        drawn.add(cell.row)
        yield elements.importance_by_system(score, masks, cell.row)
