"""The page of one run: what it achieved, how its training went, its elements and its labels."""

from collections.abc import Iterator

from matplotlib import rc_context

from stages.config import FAST, SLOW, TRAINED, UNTRAINED_TARGETS, Config, split_target
from stages.evaluation.statistics import p_value
from stages.lora.training import curves
from stages.pipeline.state import current_artifact
from stages.pipeline.steps import Step
from stages.records import read_json
from stages.report import comparison, elements, figures, voters
from stages.report.comparison import Answers, Measured
from stages.report.frontier import frontier
from stages.report.page import Block, PageSection, Picture, Text, Tiles, render
from stages.store.artifacts import Artifact, Store

Overall = dict[str, dict[str, Measured]]
"""Benchmark, target → the accuracy over all items, if any is graded."""
SIGNIFICANT = 0.05
"""Greatest p-value of a difference that chance does not explain."""


def page(config: Config, steps: dict[str, Step], run: str) -> str:
    """Render the page. run: the command that makes missing steps."""
    store = Store(config.root)
    current = {name: current_artifact(store, step) for name, step in steps.items()}
    artifacts = {name: artifact for name, artifact in current.items() if artifact}
    # An evaluation that finishes from here on must not be in the tables: its artifact would be missing.
    evaluations = comparison.evaluations(step for name, step in steps.items() if name in artifacts)
    answers, titles = comparison.answers_of(store, evaluations, "system"), titles_of(config)
    measures = {name: list(comparison.compared(of_benchmark)) for name, of_benchmark in answers.items()}
    overall = {
        name: {each.target: each for each in of_benchmark if each.group == "all" and each.accuracy}
        for name, of_benchmark in measures.items()
    }
    sections = [
        PageSection("results", "Results", list(_results(measures, answers, titles))),
        PageSection("training", "Training", list(_training(artifacts))),
        PageSection("elements", "Elements", list(elements.parts(artifacts))),
        PageSection("labels", "Labels", list(_labels(artifacts))),
    ]
    if missing := [name for name in steps if name not in artifacts]:
        not_made = Text(f"Not made yet: {', '.join(missing)}.")
        sections.append(PageSection("missing", "Missing", [not_made, Text(run, "pre")]))
    lead: list[str | Tiles] = [*_tiles(overall, titles), *_verdicts(overall, answers, titles)]
    return render(f"lorapar: {config.run}", lead, sections)


def titles_of(config: Config) -> dict[str, str]:
    """Target → what people call it: the modes are those of the last adapter that is evaluated."""
    last, titles = config.eval.trained[-1:], {}
    for target in config.eval.targets:
        weights, mode = split_target(target)
        if weights in UNTRAINED_TARGETS:
            titles[target] = target
        elif not config.modes:
            titles[target] = target.upper()
        else:
            titles[target] = mode if weights in last else f"{mode} after {weights.upper()}"
    return titles


def _tiles(overall: Overall, titles: dict[str, str]) -> Iterator[Tiles]:
    """Show accuracy and mean tokens of the base and the modes on each benchmark.

    titles: target → what it is called.
    """
    for name, by_target in overall.items():
        tiles = []
        for target, title in titles.items():
            if each := by_target.get(target):
                length = f"{each.metrics['tokens']:.0f} tokens" if "tokens" in each.metrics else ""
                tiles.append((f"{title[0].upper()}{title[1:]} on {name}", each.share, length))
        if len(tiles) > 1:
            yield tiles


def _verdicts(overall: Overall, answers: dict[str, Answers], titles: dict[str, str]) -> Iterator[str]:
    """Say for each benchmark what the last target changed, and which targets are worse than the base."""
    for name, by_target in overall.items():
        if not by_target:
            continue
        last, base = list(by_target.values())[-1], by_target.get("base")
        yield _verdict(name, last, by_target.get(last.against or ""), titles)
        for target, each in by_target.items():
            is_told = (target, "base") == (last.target, last.against)
            if base and not is_told and each.metrics["accuracy"] < base.metrics["accuracy"]:
                pair = {side: {"all": answers[name][side]["all"]} for side in ("base", target)}
                _, against_base = comparison.compared(pair)
                yield _verdict(name, against_base, base, titles)


def _verdict(benchmark: str, measure: Measured, previous: Measured | None, titles: dict[str, str]) -> str:
    title, number = titles.get(measure.target, measure.target), measure.metrics["n"]
    sentence = f"{benchmark}: {title} answers {measure.share} of {number} items"
    return f"{sentence} correctly{_meaning(measure, previous, titles)}."


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


def _results(
    measures: dict[str, list[Measured]], answers: dict[str, Answers], titles: dict[str, str]
) -> Iterator[Block]:
    """Build a table of each benchmark, and a figure of accuracy over the length of an answer."""
    for name, of_benchmark in measures.items():
        yield comparison.grid(name, of_benchmark, titles)
        points = {
            titles[each.target]: (each.metrics["tokens"], each.accuracy)
            for each in of_benchmark
            if each.group == "all" and each.accuracy and each.metrics.get("tokens")
        }
        text, mixture = f"Accuracy on {name} over the mean tokens of an answer, with 95 % intervals.", []
        samples = {titles[target]: groups["all"] for target, groups in answers[name].items()}
        of_modes, meaning = frontier(samples)
        caption = text
        if of_modes:
            mixture = [(at, 100 * value.mean) for at, value in map(of_modes.__getitem__, (FAST, SLOW))]
            caption += f" The line: fast and slow mixed at random. {meaning}"
        if len(points | of_modes) > 1:
            series = {name: [point] for name, point in (points | of_modes).items()}
            labels = "mean tokens of an answer", f"accuracy on {name}, %"
            yield Picture(figures.svg(figures.line_plot(series, {}, {}, *labels, mixture)), text, caption)


def _training(artifacts: dict[str, Artifact]) -> Iterator[Block]:
    for name in TRAINED:
        if name not in artifacts:
            continue
        history = read_json(artifacts[name].path / "history.json")
        yield Text(f"{name.upper()}, {len(history)} steps", "h3")
        for title in curves.panels(history):
            with rc_context(figures.STYLE):
                figure = figures.svg(curves.history_figure(history, title))
            yield Picture(figure, f"{name.upper()}: {title}, by optimizer step.")


def _labels(artifacts: dict[str, Artifact]) -> Iterator[Block]:
    """Summarize the labels of each data set, and the voters where there were any."""
    for name, artifact in artifacts.items():
        if name.startswith("classify:"):
            summary = artifact.manifest["summary"].items()
            counts = ", ".join(f"{n} {key}" for key, n in summary if isinstance(n, int))
            counts = counts.replace("_", " ").replace("system", "System ")
            yield Text(f"{name.removeprefix('classify:')}: {counts}.")
            if grid := voters.grid(artifact.path):
                yield grid
