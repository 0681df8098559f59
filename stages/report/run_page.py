"""The page of one run: what it achieved, how its training went, and what it cost."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from stages.config import REGIONS, SECOND_SFT, TRAINED, Config
from stages.evaluation.statistics import p_value
from stages.lora.training import curves
from stages.pipeline.state import current_artifact
from stages.pipeline.steps import Step
from stages.records import read_json
from stages.report import comparison, elements, figures, voters
from stages.report.page import (
    Block,
    Command,
    Grid,
    Heading,
    PageSection,
    Picture,
    Pictures,
    Text,
    Tiles,
    render,
)
from stages.store.artifacts import Artifact, Store
from stages.sweep.values import Value

BESIDE = 4.2
"""Inches of a figure that stands beside the table of results."""
SIGNIFICANT = 0.05
"""Greatest p-value of a difference that chance does not explain."""


def page(config: Config, steps: dict[str, Step], run: str, serve: str) -> str:
    """Render the page. run: the command that makes missing steps. serve: the one that serves the modes."""
    lead, sections, missing = build(config, steps, Store(config.root))
    modes = config.eval.modes
    trained = {TRAINED[target] for target in modes.values()} <= steps.keys() - missing
    chats = all(config.prompt_of(target).template == "chat" for target in modes.values())
    if config.served_by_vllm and trained and chats:
        how = Text(f"One vLLM server offers the modes fast (sft) and slow ({modes['slow']}):")
        sections.append(PageSection("serving", "Serving", [how, Command(serve)]))
    if missing:
        not_made = Text(f"Not made yet: {', '.join(missing)}.")
        sections.append(PageSection("missing", "Missing", [not_made, Command(run)]))
    return render(f"lorapar: {config.run}", lead, sections)


def build(
    config: Config, steps: dict[str, Step], store: Store
) -> tuple[list[str | Tiles], list[PageSection], list[str]]:
    """Build the lead, all sections, and the names of the steps that are not current."""
    current = {name: current_artifact(store, step) for name, step in steps.items()}
    artifacts = {name: artifact for name, artifact in current.items() if artifact}
    # An evaluation that finishes from here on must not be in the tables: its artifact would be missing.
    evaluations = [step for name, step in steps.items() if step.stage.name == "eval" and name in artifacts]
    tables = comparison.tables(store, evaluations, "system")
    missing = [name for name in steps if name not in artifacts]
    sections = [
        PageSection("results", "Results", list(_results(tables))),
        PageSection("training", "Training", list(_training(artifacts))),
        PageSection("elements", "Elements", list(elements.parts(artifacts))),
        PageSection("labels", "Labels", list(_label_counts(artifacts))),
    ]
    titles = {target: mode for mode, target in config.eval.modes.items()}
    return [*_tiles(config, tables), *_verdicts(tables, titles)], sections, missing


def _tiles(config: Config, tables: dict[str, list[dict[str, Any]]]) -> list[Tiles]:
    """Show accuracy and mean tokens of the base and the modes on each benchmark."""
    titles = {
        "base": "Base",
        config.eval.modes["fast"]: "Fast",
        config.eval.modes["slow"]: "Slow",
    }
    rows_of_tiles = []
    for name, rows in tables.items():
        overall = {
            row["target"]: row for row in rows if row["group"] == "all" and row["accuracy"] is not None
        }
        most = max((row["n"] for row in overall.values()), default=0)
        tiles = [
            (f"{title} on {name}", _accuracy(overall[target]), _tokens(overall[target], most))
            for target, title in titles.items()
            if target in overall
        ]
        rows_of_tiles += [Tiles(tiles)] if len(tiles) > 1 else []
    return rows_of_tiles


def _tokens(row: dict[str, Any], most: int) -> str:
    """Say how long a target's answers are, and how many it gave if others gave more."""
    parts = [] if row["tokens"] is None else [f"{row['tokens']:.0f} tokens"]
    parts += [f"{row['thought_tokens']:.0f} of them thought"] if row["thought_tokens"] else []
    parts += [f"{row['n']} items"] if row["n"] < most else []
    parts += [f"{row['truncated']} cut off"] if row["truncated"] else []
    return ", ".join(parts)


def _verdicts(tables: dict[str, list[dict[str, Any]]], titles: dict[str, str]) -> Iterator[str]:
    """Say for each benchmark how the last target does against the one before, and if that may be chance.

    Regions are left out. titles: target → the mode that it is.
    """
    for name, rows in tables.items():
        measured = [row for row in rows if row["accuracy"] is not None]
        graded = [row for row in measured if row["target"] not in REGIONS]
        overall = [row for row in graded if row["group"] == "all"]
        if not overall:
            continue
        last = overall.pop()
        target = titles.get(last["target"], last["target"])
        sentence = f"{name}: {target} answers {_accuracy(last)} of {last['n']} items correctly"
        sentence += _meaning(last, overall[-1], titles) if overall else ""
        yield f"{sentence}."


def _meaning(last: dict[str, Any], previous: dict[str, Any], titles: dict[str, str]) -> str:
    """Continue the verdict: the change against the previous target, and what the paired test says of it."""
    change = last["accuracy"] - previous["accuracy"] if last["p"] is None else last["change"]
    target = "the base model" if previous["target"] == "base" else previous["target"]
    points = f": {100 * change:+.1f} points against {titles.get(target, target)}"
    if last["p"] is None:
        return f"{points}, which is not tested, because they answered different items"
    verdict = "more than chance explains" if last["p"] < SIGNIFICANT else "which may be chance"
    return f"{points}, {verdict} ({p_value(last['p'])}, paired test over {last['tested']} items)"


def _accuracy(row: dict[str, Any]) -> str:
    return f"{100 * row['accuracy']:.1f}\N{NO-BREAK SPACE}%"


def _results(tables: dict[str, list[dict[str, Any]]]) -> Iterator[Block]:
    """Build a table and a figure of accuracies for each benchmark."""
    for name, measurements in tables.items():
        head, rows = comparison.table(name, measurements, to=",\N{NO-BREAK SPACE}", before_p="\n")
        targets = head[2:]
        caption = "Accuracy in % [95 % interval over items]; tokens: mean length of an answer; "
        caption += comparison.p_note(targets)
        if fewer := comparison.answered_fewer(measurements):
            caption += f" On {name}, {fewer}"
        yield Grid(head, rows, caption)
        groups = dict.fromkeys(row["group"] for row in measurements)
        series: dict[str, dict[str, Value]] = {target: {} for target in targets}
        for row in measurements:
            if (value := comparison.value_of(row)) and value.over_items:
                series[row["target"]][row["group"]] = value
        svg = figures.svg(figures.dot_plot(list(groups), series, {}, BESIDE))
        text = f"Accuracies on {name} with intervals, as in the table above."
        pictures = [Picture(svg, text)]
        points = {
            row["target"]: [(row["tokens"], value)]
            for row in measurements
            if row["group"] == "all" and row["tokens"] and (value := comparison.value_of(row))
        }
        if len(points) > 1:
            plot = figures.line_plot(points, {}, {}, "mean tokens of an answer", "accuracy, %", BESIDE)
            svg = figures.svg(plot)
            pictures.append(Picture(svg, f"Accuracy on {name} by the mean tokens of an answer."))
        yield Pictures(pictures)


def _training(artifacts: dict[str, Artifact]) -> Iterator[Block]:
    """Draw the curves of each training, a figure for each panel."""
    windows = {"sft": 1, SECOND_SFT: 1, "rl": figures.WINDOW}
    for name, window in windows.items():  # the rewards of one step are few and noisy
        if name not in artifacts:
            continue
        history = read_json(artifacts[name].path / "history.json", curves.History)
        pictures = []
        for title, series in curves.panels(history).items():
            points = {label: curves.points(history, key) for label, key in series.items()}
            lasts = ", ".join(f"{label} {values[-1][1]:.3g}" for label, values in points.items())
            text = f"{name}: {title}, by optimizer step; at the end: {lasts}."
            pictures.append(Picture(figures.svg(figures.training_panel(title, points, window)), text))
        yield Heading(f"{name}, {len(history)} steps")
        if window > 1:
            yield Text(f"Faint: the values; bold: means of the last {window} steps.", quiet=True)
        yield Pictures(pictures)


def _label_counts(artifacts: dict[str, Artifact]) -> Iterator[Block]:
    """Summarize the labels of each data set, and the voters where there were any."""
    for name, artifact in artifacts.items():
        if not name.startswith("classify:"):
            continue
        counts = {key: n for key, n in artifact.manifest["summary"].items() if isinstance(n, int)}
        titles = {key: re.sub(r"^system(?=\d)", "System ", key).replace("_", " ") for key in counts}
        listed = ", ".join(f"{n} {titles[key]}" for key, n in counts.items())
        yield Text(f"{name.partition(':')[2]}: {listed}.")
        yield from voters.blocks(artifact.path)
