"""The page of one or several tables of many runs."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from stages.evaluation.statistics import holm, p_value
from stages.pipeline.steps import Step
from stages.report import elements, figures, run_page
from stages.report.page import (
    Command,
    Details,
    Grid,
    Heading,
    PageSection,
    Part,
    Picture,
    Pictures,
    Text,
    render,
)
from stages.report.run_page import won_and_lost
from stages.store.estimates import PlannedCost, actual_and_planned
from stages.sweep import formats
from stages.sweep.file import Plot
from stages.sweep.results import Results, Value, answers, reading
from stages.sweep.table import Cell

if TYPE_CHECKING:
    from stages.lora.training.curves import History


@dataclass(frozen=True)
class Commands:
    """What makes what is missing of a table, and of each of its rows."""

    all: str
    rows: dict[str, str]


def page(found: list[tuple[Results, Commands]]) -> str:
    titles = [results.table.file.title for results, _ in found]
    verdicts = zip(titles, (_verdict(results) for results, _ in found), strict=True)
    lead = [f"{title}. {said}" if len(titles) > 1 else said for title, said in verdicts if said]
    title = titles[0] if len(titles) == 1 else "lorapar: tables"
    return render(title, lead, [_section(results, commands) for results, commands in found])


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
    begin = f"{number} {verb} compared with {against!r} on {compare.on}: "
    named = [f"{row!r} {100 * known[row].mean:+.1f} ({p_value(p)})" for row, p in told.items() if p < 0.05]
    how = "over items, training seeds as they are, corrected for the number of rows by Holm's method"
    if not named:
        return f"{begin}no difference is told apart from chance ({how})."
    return f"{begin}told apart from chance ({how}), in points: {'; '.join(named)}."


def _section(results: Results, commands: Commands) -> PageSection:
    file = results.table.file
    head, rows = formats.grid(results)
    name = re.sub(r"\W+", "-", results.table.path.stem)
    parts: list[Part] = [Text(file.notes.strip())] if file.notes else []
    parts.append(Grid(head, rows, formats.legend(results)))
    if drawn := (_over(results, file.plot) if file.plot else None) or _dots(results):
        parts.append(Pictures([drawn]))
    if file.importance and (pictures := _importance(results)):
        parts.append(Pictures(pictures))
    if curves := _trainings(results):
        parts.append(Pictures([curves]))
    parts += [Text("Made, or completed, by:", quiet=True), Command(commands.all)]
    parts += [_rows(results, commands), *_unlike(results), *_whole(results)]
    return PageSection(name, file.title, parts)


def _rows(results: Results, commands: Commands) -> Details:
    """What each row is, what it took, and what makes it."""
    settings = results.table.file.settings()
    lines = []
    for row in results.table.rows:
        cells = [cell for cell in results.table.cells if cell.row == row]
        whole = [took for cell in cells if (took := _spent(results, cell)) is not None]
        spent = [each for took in whole for each in took]
        seconds = sum(took.seconds or 0 for took in spent) / max(1, len(whole))
        peak = max((took.mib for took in spent if took.mib is not None), default=None)
        own = [f"{name}: {json.dumps(v, ensure_ascii=False)}" for name, v in settings[row].items()]
        lines.append([
            row, "; ".join(own), f"{seconds:.0f}" if spent else "",
            "" if peak is None else f"{peak:.0f}", commands.rows[row],
        ])  # fmt: skip
    caption = (
        "Seconds: of a seed in the mean, with the steps that it shares with others; of seeds that are whole."
    )
    head = ["row", "settings", "seconds", "peak memory, MiB", "command"]
    return Details("What each row is, took, and is made by", [Grid(head, lines, caption, prose=True)])


def _spent(results: Results, cell: Cell) -> list[PlannedCost] | None:
    """Of each step that is made for a cell; None if one is missing."""
    names: dict[str, None] = {}

    def add(step: Step) -> None:
        names[step.name] = None
        for before in step.inputs.values():
            add(before)

    for column in cell.columns.values():
        for name in column.steps:
            add(cell.steps[name])
    made = [results.artifacts.current(cell, name) for name in names]
    found = [
        actual_and_planned(artifact.manifest["provenance"])[0] for artifact in made if artifact is not None
    ]
    return found if len(found) == len(made) else None


def _unlike(results: Results) -> list[Part]:
    """Items that a row and the one that it is compared with answered unlike, in their first common seed."""
    compare, against = results.table.file.compare, results.table.against
    if compare is None:
        return []
    first = {cell.seed: cell for cell in results.table.cells if cell.row == against}
    parts: list[Part] = []
    for row in results.table.rows:
        both = [cell for cell in results.table.cells if cell.row == row and cell.seed in first]
        if row == against or results.comparisons.get(row) is None or not both:
            continue
        pair = first[both[0].seed], both[0]
        columns = [cell.columns[compare.on] for cell in pair]
        made = [results.artifacts.current(cell, c.step) for cell, c in zip(pair, columns, strict=True)]
        if made[0] is not None and made[1] is not None:
            before, after = answers(made[0], columns[0]), answers(made[1], columns[1])
            read = reading(columns[0]), reading(columns[1])
            what = f"{compare.on}, seed {both[0].seed}: "
            parts += won_and_lost(what, (pair[0].row, before), (pair[1].row, after), read)
    return [Details(f"Won and lost against {against}", parts)] if parts else []


def _whole(results: Results) -> list[Part]:
    """All that there is to be seen of one cell, if possible of the row that others are compared with."""
    cells = sorted(results.table.cells, key=lambda cell: cell.row != results.table.against)
    shown = ((cell, column.steps) for cell in cells for column in cell.columns.values())
    there = (cell for cell, names in shown if all(results.artifacts.current(cell, name) for name in names))
    cell = next(there, None)
    if cell is None:
        return []
    lead, sections, _ = run_page.build(cell.config, cell.steps, results.artifacts.store(cell))
    parts: list[Part] = [Text(sentence) for sentence in lead]
    for section in sections:
        if section.parts:
            parts += [Heading(section.title), *section.parts]
    return [Details(f"In full: {cell.row}, seed {cell.seed}", parts)]


def _dots(results: Results) -> Picture | None:
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
    return Picture(figures.svg(drawn), text, "Accuracy with its 95 % interval over items.")


def _mark(value: Value) -> figures.Mark:
    assert value.low is not None and value.high is not None
    return 100 * value.mean, 100 * value.low, 100 * value.high


def _over(results: Results, plot: Plot) -> Picture | None:
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
    return Picture(figures.svg(drawn), text, f"{plot.y} over {plot.x}, with 95 % intervals over items.")


def _trainings(results: Results) -> Picture | None:
    """Curves of RL, of all seeds that are there; what two rows share stands under the first of them."""
    from stages.lora.training.curves import OVERVIEW

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
    return Picture(figures.svg(drawn), text, f"RL, moving means over {figures.WINDOW} steps.")


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
