"""Targets of a run side by side: the answers to each group of items, compared item by item."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from stages.errors import ConfigError
from stages.evaluation.metrics import accuracy_by_item, accuracy_metrics, answers_by_item
from stages.evaluation.statistics import p_value
from stages.pipeline.state import current_artifact
from stages.pipeline.steps import Step
from stages.records import Sample, read_samples
from stages.report.page import Grid
from stages.store.artifacts import Store
from stages.sweep.values import NothingToShow, Value, accuracy, difference

CAPTION = (
    "Accuracy in % [95 % interval over items]; tokens: mean length of an answer; p: paired test on the same "
    "items against the target before it."
)
Answers = dict[str, dict[str, list[Sample]]]
"""Graded answers by target and group."""


@dataclass(frozen=True)
class Measured:
    """Answers of a target to the items of a group."""

    target: str
    group: str
    metrics: dict[str, Any]
    """All that `accuracy_metrics` says of them, such as the number of graded items `n`."""
    accuracy: Value | None
    """None if no item is graded."""
    against: str | None
    """Target with which it is compared."""
    change: Value | None
    """Difference from that target; None if the two were not asked the same items."""

    @property
    def share(self) -> str:
        return "–" if self.accuracy is None else f"{100 * self.accuracy.mean:.1f}\N{NO-BREAK SPACE}%"

    @property
    def p(self) -> float | None:
        return self.change.over_items.p if self.change and self.change.over_items else None


def evaluations(steps: Iterable[Step]) -> list[Step]:
    """The steps among these that grade answers."""
    return [step for step in steps if step.stage.name == "eval"]


def measured(store: Store, steps: list[Step], by: str) -> dict[str, list[Measured]]:
    """Measure each benchmark: each target and group of items. by: see `answers_of`."""
    return {name: list(compared(answers)) for name, answers in answers_of(store, steps, by).items()}


def answers_of(store: Store, steps: list[Step], by: str) -> dict[str, Answers]:
    """Read the graded answers to each benchmark.

    by: `system`, or the field of the items that groups them. ConfigError if no item has that field.
    """
    answers_by_benchmark: dict[str, Answers] = {}
    fields = {"system"}
    for step in steps:
        target, _, benchmark = step.variant.partition("@")
        artifact = current_artifact(store, step)
        if artifact is None:
            continue
        answers = answers_by_benchmark.setdefault(benchmark, {}).setdefault(target, {})
        for sample in read_samples(artifact.path / "samples.jsonl"):
            fields |= sample.extra.keys()
            value = sample.system if by == "system" else sample.extra.get(by)
            # "all" is the group of all items, even where a field has that value.
            group = f"{by} {value}" if by == "system" or str(value) == "all" else str(value)
            for name in ("all", *([] if value is None else [group])):
                answers.setdefault(name, []).append(sample)
    if answers_by_benchmark and by not in fields:
        raise ConfigError(f"no item has a field {by!r}", f"choose from: {', '.join(sorted(fields))}")
    return answers_by_benchmark


def compared(answers_by_target: Answers) -> Iterator[Measured]:
    """Measure each target and group, and compare it with the previous target on the same items."""
    names = {name for answers in answers_by_target.values() for name in answers}
    groups = sorted(names, key=lambda name: (name != "all", name))
    against: str | None = None
    for target, answers in answers_by_target.items():
        for group in (name for name in groups if name in answers):
            shares = shares_by_item(answers[group])
            reference = answers_by_target[against].get(group, []) if against else []
            change = None
            same_items = {sample.id for sample in reference} == {sample.id for sample in answers[group]}
            with suppress(NothingToShow):
                change = difference([shares_by_item(reference)], [shares]) if same_items else None
            mean = accuracy([shares]) if shares else None
            yield Measured(target, group, accuracy_metrics(answers[group]), mean, against, change)
        against = target


def shares_by_item(samples: list[Sample]) -> dict[str, float]:
    return accuracy_by_item(answers_by_item(samples))


def grid(benchmark: str, measures: list[Measured], titles: Mapping[str, str]) -> Grid:
    """Tabulate a benchmark: a column for each target. titles: target → what it is called, if not by its name.

    The first rows are accuracies, one for each group of items, and they alone have a number of items. Then
    come mean answer lengths, the flexible reading and counts of unusable answers.
    """
    groups: dict[str, dict[str, Measured]] = {}
    for measure in measures:
        groups.setdefault(measure.group, {})[measure.target] = measure
    overall = groups.get("all", {})  # every target is in this group
    rows = [
        [
            group,
            str(max(each.metrics["n"] for each in of_target.values())),
            *(_cell(of_target.get(target)) for target in overall),
        ]
        for group, of_target in groups.items()
    ]
    for title, name in (("tokens", "tokens"), ("tokens of thought", "thought_tokens")):
        for group, of_target in groups.items():
            lengths = [each.metrics.get(name) if each else None for each in map(of_target.get, overall)]
            if any(length is not None for length in lengths):
                rows.append([f"{title}, {group}", "", *("–" if n is None else f"{n:.0f}" for n in lengths)])
    metrics = [each.metrics for each in overall.values()]
    if any(of_target["accuracy_flexible"] != of_target["accuracy"] for of_target in metrics):
        rows.append(
            ["all, flexible", "", *(percent(of_target["accuracy_flexible"]) for of_target in metrics)]
        )
    for outcome in ("unparsed", "truncated", "refused"):
        if any(counts := [of_target[outcome] for of_target in metrics]):
            rows.append([f"  {outcome}", "", *map(str, counts)])
    return Grid([benchmark, "n", *(titles.get(target, target) for target in overall)], rows, CAPTION)


def _cell(measure: Measured | None) -> str:
    if measure is None or measure.accuracy is None:
        return "–"
    return measure.accuracy.text() + ("" if measure.p is None else f"\n{p_value(measure.p)}")


def percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f}"
