"""The page of one run: what it achieved, how its training went, its elements and its labels."""

from __future__ import annotations

import re
from collections.abc import Iterator

from stages.config import REGIONS, TRAINED, Config
from stages.evaluation.statistics import p_value
from stages.lora.training import curves
from stages.pipeline.state import current_artifact
from stages.pipeline.steps import Step
from stages.records import read_json
from stages.report import comparison, elements, figures, voters
from stages.report.comparison import Measured
from stages.report.page import Block, Command, Heading, PageSection, Picture, Pictures, Text, Tiles, render
from stages.store.artifacts import Artifact, Store

BESIDE = 4.2
"""Inches of a figure that stands beside the table of results."""
SIGNIFICANT = 0.05
"""Greatest p-value of a difference that chance does not explain."""


def page(config: Config, steps: dict[str, Step], run: str, serve: str) -> str:
    """Render the page. run: the command that makes missing steps. serve: the one that serves the modes."""
    store = Store(config.root)
    current = {name: current_artifact(store, step) for name, step in steps.items()}
    artifacts = {name: artifact for name, artifact in current.items() if artifact}
    # An evaluation that finishes from here on must not be in the tables: its artifact would be missing.
    evaluations = [step for name, step in steps.items() if step.stage.name == "eval" and name in artifacts]
    measures = comparison.measured(store, evaluations, "system")
    sections = [
        PageSection("results", "Results", list(_results(measures))),
        PageSection("training", "Training", list(_training(artifacts))),
        PageSection("elements", "Elements", list(elements.parts(artifacts))),
        PageSection("labels", "Labels", list(_label_counts(artifacts))),
    ]
    modes = config.eval.modes
    trained = {TRAINED[target] for target in modes.values()} <= artifacts.keys()
    chats = all(config.prompt_of(target).template == "chat" for target in modes.values())
    if config.served_by_vllm and trained and chats:
        how = Text(f"One vLLM server offers the modes fast (sft) and slow ({modes['slow']}):")
        sections.append(PageSection("serving", "Serving", [how, Command(serve)]))
    if missing := [name for name in steps if name not in artifacts]:
        not_made = Text(f"Not made yet: {', '.join(missing)}.")
        sections.append(PageSection("missing", "Missing", [not_made, Command(run)]))
    titles = {"base": "base", **{target: mode for mode, target in modes.items()}}
    lead: list[str | Tiles] = [*_tiles(measures, titles), *_verdicts(measures, titles)]
    return render(f"lorapar: {config.run}", lead, sections)


def _tiles(measures: dict[str, list[Measured]], titles: dict[str, str]) -> Iterator[Tiles]:
    """Show accuracy and mean tokens of the base and the modes on each benchmark.

    titles: target → what it is called.
    """
    for name, of_benchmark in measures.items():
        overall = {each.target: each for each in of_benchmark if each.group == "all" and each.accuracy}
        most = max((each.n for each in overall.values()), default=0)
        tiles = [
            (f"{title.capitalize()} on {name}", overall[target].share, _tokens(overall[target], most))
            for target, title in titles.items()
            if target in overall
        ]
        if len(tiles) > 1:
            yield Tiles(tiles)


def _tokens(measure: Measured, most: int) -> str:
    """Say how long a target's answers are, and how many it gave if others gave more."""
    parts = [] if measure.tokens is None else [f"{measure.tokens:.0f} tokens"]
    parts += [f"{measure.thought_tokens:.0f} of them thought"] if measure.thought_tokens else []
    parts += [f"{measure.n} items"] if measure.n < most else []
    parts += [f"{measure.outcomes['truncated']} cut off"] if measure.outcomes["truncated"] else []
    return ", ".join(parts)


def _verdicts(measures: dict[str, list[Measured]], titles: dict[str, str]) -> Iterator[str]:
    """Say for each benchmark how the last target does against the one before, and if that may be chance."""
    for name, of_benchmark in measures.items():
        overall = {
            each.target: each
            for each in of_benchmark
            if each.group == "all" and each.accuracy and each.target not in REGIONS
        }
        if not overall:
            continue
        last = list(overall.values())[-1]
        sentence = f"{name}: {titles.get(last.target, last.target)} answers {last.share} of {last.n} items "
        yield f"{sentence}correctly{_meaning(last, overall.get(last.against or ''), titles)}."


def _meaning(last: Measured, previous: Measured | None, titles: dict[str, str]) -> str:
    """Continue the verdict: the change against the previous target, and what the paired test says of it."""
    if not (previous and previous.accuracy and last.accuracy):
        return ""
    change = last.change.mean if last.change else last.accuracy.mean - previous.accuracy.mean
    named = "the base model" if previous.target == "base" else titles.get(previous.target, previous.target)
    points = f": {100 * change:+.1f} points against {named}"
    if last.change is None or last.p is None:
        return f"{points}, which is not tested, because they answered different items"
    verdict = "more than chance explains" if last.p < SIGNIFICANT else "which may be chance"
    return f"{points}, {verdict} ({p_value(last.p)}, paired test over {last.change.n} items)"


def _results(measures: dict[str, list[Measured]]) -> Iterator[Block]:
    """Build a table of each benchmark, and the frontier of accuracy over the length of an answer."""
    for name, of_benchmark in measures.items():
        yield comparison.grid(name, of_benchmark)
        points = {
            each.target: [(each.tokens, each.accuracy)]
            for each in of_benchmark
            if each.group == "all" and each.tokens and each.accuracy
        }
        if len(points) > 1:
            plot = figures.line_plot(points, {}, {}, "mean tokens of an answer", "accuracy, %", BESIDE)
            text = f"Accuracy on {name} by the mean tokens of an answer."
            yield Pictures([Picture(figures.svg(plot), text)])


def _training(artifacts: dict[str, Artifact]) -> Iterator[Block]:
    """Draw the curves of each training, a figure for each panel."""
    for name in TRAINED.values():
        if name not in artifacts:
            continue
        history = read_json(artifacts[name].path / "history.json", curves.History)
        # The rewards of one step are few and noisy.
        window = figures.WINDOW if any("reward" in row for row in history) else 1
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
