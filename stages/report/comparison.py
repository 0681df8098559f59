"""Targets side by side: a run's graded answers compared item by item."""

from collections.abc import Iterable, Iterator
from statistics import fmean
from typing import Any

from pydantic import BaseModel, NonNegativeInt

from stages.config import REGIONS
from stages.errors import ConfigError
from stages.evaluation.metrics import accuracy_by_item, accuracy_metrics, answers_by_item
from stages.evaluation.statistics import Interval, paired_p
from stages.pipeline.state import current_artifact
from stages.pipeline.steps import Step
from stages.records import OUTCOMES, Sample, read_samples
from stages.store.artifacts import Store
from stages.sweep.values import Value

Answers = dict[str, dict[str, list[Sample]]]
"""Graded answers by target and group."""


class Measures(BaseModel):
    """Figures of a group of items in metrics.json; without items there are none."""

    n: NonNegativeInt = 0
    accuracy: float | None = None
    interval: tuple[float, float] | None = None

    @property
    def value(self) -> Value | None:
        if self.accuracy is None or self.interval is None:
            return None
        return Value(self.accuracy, n=self.n, over_items=Interval(*self.interval))


def tables(store: Store, steps: list[Step], by: str) -> dict[str, list[dict[str, Any]]]:
    """Measure each benchmark: one row for each target and group of items.

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
    return {benchmark: list(compared(answers)) for benchmark, answers in answers_by_benchmark.items()}


def p_note(targets: Iterable[str]) -> str:
    """Explain what the p-values of these targets compare."""
    note = "p: paired test on the same items against the target to the left."
    regions = " Regions alone are tested against the model that they are of."
    return note + (regions if set(targets) & set(REGIONS) else "")


def compared(answers_by_target: Answers) -> Iterator[dict[str, Any]]:
    """Yield the accuracy of each target and group with its interval, and its p-value against another target.

    A target is tested against the previous one that is no region, and a region against rl, whose elements
    it is a part of. The p-value is None where the two targets did not answer the same items.
    """
    names = {name for answers in answers_by_target.values() for name in answers}
    groups = sorted(names, key=lambda name: (name != "all", name))
    previous: str | None = None
    for target, answers in answers_by_target.items():
        against = previous if target not in REGIONS else "rl" if "rl" in answers_by_target else None
        for group in (name for name in groups if name in answers):
            measures = accuracy_metrics(answers[group])
            low, high = measures["interval"] or (None, None)
            reference = answers_by_target[against].get(group, []) if against else []
            yield {
                "target": target,
                "group": group,
                "n": measures["n"],
                "accuracy": measures["accuracy"],
                "low": low,
                "high": high,
                "flexible": measures["accuracy_flexible"],
                "tokens": measures.get("tokens"),
                "thought_tokens": measures.get("thought_tokens"),
                **{name: measures[name] for name in OUTCOMES},
                "against": against,
                **_paired_test(reference, answers[group]),
            }
        previous = previous if target in REGIONS else target


def answered_fewer(rows: list[dict[str, Any]]) -> str:
    """Name the targets of a benchmark that answered fewer items than another, in a sentence, or return ""."""
    answered = {row["target"]: row["n"] for row in rows if row["group"] == "all"}
    most = max(answered.values(), default=0)
    fewer = [f"{target} answered {n} of {most} items" for target, n in answered.items() if n < most]
    return f"{', '.join(fewer)}." if fewer else ""


def _paired_test(reference: list[Sample], samples: list[Sample]) -> dict[str, float | int | None]:
    """Test `samples` against `reference` on the items that were graded for both: p, their number, the change.

    All are None if the two were not asked the same items, or no item was graded for both.
    """
    baseline, accuracies = (accuracy_by_item(answers_by_item(answers)) for answers in (reference, samples))
    items = [item for item in accuracies if item in baseline]
    if not items or {sample.id for sample in reference} != {sample.id for sample in samples}:
        return dict.fromkeys(("p", "tested", "change"))
    pairs = [baseline[item] for item in items], [accuracies[item] for item in items]
    return {"p": paired_p(*pairs), "tested": len(items), "change": fmean(pairs[1]) - fmean(pairs[0])}


def value_of(row: dict[str, Any]) -> Value | None:
    """The accuracy of a target and group, with its interval and the p-value of its test; None if none."""
    if row["accuracy"] is None:
        return None
    interval = None if row["low"] is None else Interval(row["low"], row["high"], row["p"])
    return Value(row["accuracy"], n=row["n"], over_items=interval)


def table(
    benchmark: str, measurements: list[dict[str, Any]], to: str = ", ", before_p: str = ", "
) -> tuple[list[str], list[list[str]]]:
    """Return the head and the rows of a benchmark's measurements: a column for each target.

    The first rows are accuracies, one for each group of items, and they alone have a number of items. Then
    come mean answer lengths, the flexible reading and counts of unusable answers. to, before_p: as for
    `Value.text`.
    """
    groups: dict[str, dict[str, dict[str, Any]]] = {}
    for row in measurements:
        groups.setdefault(row["group"], {})[row["target"]] = row
    overall = groups.get("all", {})  # every target is in this group
    rows = []
    for group, by_target in groups.items():
        values = [value_of(by_target[target]) if target in by_target else None for target in overall]
        n = max(row["n"] for row in by_target.values())
        texts = ("–" if value is None else value.text(to, before_p) for value in values)
        rows.append([group, str(n), *texts])
    for title, measure in (("tokens", "tokens"), ("tokens of thought", "thought_tokens")):
        for group, by_target in groups.items():
            lengths = [by_target.get(target, {}).get(measure) for target in overall]
            if any(length is not None for length in lengths):
                rows.append([f"{title}, {group}", "", *("–" if n is None else f"{n:.0f}" for n in lengths)])
    if any(row["flexible"] != row["accuracy"] for row in overall.values()):
        rows.append(["all, flexible", "", *(percent(row["flexible"]) for row in overall.values())])
    for outcome in ("unparsed", "truncated", "refused"):
        if any(counts := [row[outcome] for row in overall.values()]):
            rows.append([f"  {outcome}", "", *map(str, counts)])
    return [benchmark, "n", *overall], rows


def percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f}"
