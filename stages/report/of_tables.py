"""The page of one or several tables of many runs."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

from stages.benchmarks.statistics import holm, p_value
from stages.report import elements, figures
from stages.report.page import Command, Grid, Part, Picture, Pictures, Section, Text, render
from stages.sweep import formats
from stages.sweep.file import Plot
from stages.sweep.results import Results, Value

if TYPE_CHECKING:
    from stages.lora.curves import History


def page(found: list[tuple[Results, str]]) -> str:
    """found: each table with the command that makes what is missing of it."""
    titles = [results.table.file.title for results, _ in found]
    lead = [verdict for results, _ in found if (verdict := _verdict(results))]
    title = titles[0] if len(titles) == 1 else "lorapar: tables"
    return render(title, lead, [_section(results, command) for results, command in found])


def _verdict(results: Results) -> str:
    """What the comparison found, in a sentence."""
    compare = results.table.file.compare
    known = {row: c for row, c in results.comparisons.items() if c is not None}
    if compare is None or not known:
        return ""
    told = dict(zip(known, holm([c.p for c in known.values()]), strict=True))
    against = results.table.against
    others = len(results.table.rows) - (against in results.table.rows)
    number = "All other rows" if len(known) == others else f"{len(known)} of {others} other rows"
    verb = "is" if len(known) == 1 < others else "are"
    begin = f"{results.table.file.title}. {number} {verb} compared with {against!r} on {compare.on}: "
    named = [f"{row!r} {100 * known[row].mean:+.1f} ({p_value(p)})" for row, p in told.items() if p < 0.05]
    how = "over items, training seeds as they are, corrected for the number of rows by Holm's method"
    if not named:
        return f"{begin}no difference is told apart from chance ({how})."
    return f"{begin}told apart from chance ({how}), in points: {'; '.join(named)}."


def _section(results: Results, command: str) -> Section:
    file = results.table.file
    head, rows = formats.grid(results)
    name = re.sub(r"\W+", "-", results.table.path.stem)
    parts: list[Part] = [Text(file.notes.strip())] if file.notes else []
    parts.append(Grid(head, rows, formats.legend(results)))
    if drawn := (_over(results, file.plot, name) if file.plot else None) or _dots(results, name):
        parts.append(Pictures([drawn]))
    if file.importance and (pictures := _importance(results)):
        parts.append(Pictures(pictures))
    if curves := _trainings(results, f"{name}-rl"):
        parts.append(Pictures([curves]))
    return Section(name, file.title, [*parts, Text("Made, or completed, by:", quiet=True), Command(command)])


def _dots(results: Results, name: str) -> Picture | None:
    """Accuracies by row; None while there is none."""
    file, rows = results.table.file, results.table.rows
    series: dict[str, dict[str, figures.Mark]] = {}
    for column in file.columns:
        values = {row: results.values.get((row, column)) for row in rows}
        marks = {row: _mark(value) for row, value in values.items() if value and value.n and value.p is None}
        if marks:
            series[column] = marks
    if not series:
        return None
    published = {c: {r: part[c] for r, part in file.paper.items() if c in part and r in rows} for c in series}
    drawn = figures.dots(rows, series, published)
    text = f"Accuracies of {len(rows)} rows with 95 % intervals; the numbers are in the table above."
    return Picture(figures.svg(drawn, name), text, "Accuracy with its 95 % interval over items.")


def _mark(value: Value) -> figures.Mark:
    assert value.low is not None and value.high is not None
    return 100 * value.mean, 100 * value.low, 100 * value.high


def _over(results: Results, plot: Plot, name: str) -> Picture | None:
    """One column over another, by the series that the rows are called after; None while there is nothing."""
    series: dict[str, list[figures.Point]] = {}
    lines: dict[str, float] = {}
    for row in results.table.rows:
        x, y = results.values.get((row, plot.x)), results.values.get((row, plot.y))
        group, colon, _ = row.partition(": ")
        if y and y.n and colon and x:
            series.setdefault(group, []).append((100 * x.mean if x.n else x.mean, _mark(y)))
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
        return None
    drawn = figures.over(series, published, lines, plot.x, f"{plot.y}, %")
    text = f"{plot.y} over {plot.x} for {', '.join(series)}; the numbers are in the table above."
    return Picture(figures.svg(drawn, name), text, f"{plot.y} over {plot.x}, with 95 % intervals over items.")


def _trainings(results: Results, name: str) -> Picture | None:
    """Curves of RL, of all seeds that are there; what two rows share stands under the first of them."""
    from stages.lora.curves import OVERVIEW

    runs: dict[str, list[History]] = {}
    seen: set[Path] = set()
    for cell in results.table.cells:
        shown = {step for column in cell.columns.values() for step in column.steps}
        if not any(step == "rl" or step.startswith("eval:rl@") for step in shown):
            continue
        artifact = results.artifacts.current(cell, "rl")
        if artifact is not None and artifact.path not in seen:
            seen.add(artifact.path)
            history = json.loads((artifact.path / "history.json").read_text(encoding="utf-8"))
            runs.setdefault(cell.row, []).append(history)
    if not runs:
        return None
    drawn = figures.trainings(runs, OVERVIEW)
    text = f"RL of {len(runs)} rows, a line for each seed: {', '.join(OVERVIEW)}."
    return Picture(figures.svg(drawn, name), text, f"RL, moving means over {figures.WINDOW} steps.")


def _importance(results: Results) -> list[Picture]:
    """For each row, of its first seed that is there."""
    pictures: dict[str, Picture] = {}
    for cell in results.table.cells:
        if cell.row in pictures:
            continue
        score, masks = (results.artifacts.current(cell, step) for step in ("score", "partition:sft"))
        if score and masks and (score.path / "importance.safetensors").is_file():
            pictures[cell.row] = elements.both(score, masks, cell.row)
    return list(pictures.values())
