"""Targets side by side: the graded answers of all evaluations of a run, compared item by item."""

from collections.abc import Iterator
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from stages.config import REGIONS
from stages.errors import ConfigError
from stages.evaluation.metrics import accuracy_by_item, figures, graded
from stages.evaluation.statistics import paired_p
from stages.pipeline.state import state
from stages.pipeline.steps import Step
from stages.records import OUTCOMES, Sample, read_samples
from stages.store.artifacts import Store

Answers = dict[str, dict[str, list[Sample]]]
"""Per target and group: the graded answers."""


def tables(store: Store, steps: list[Step], by: str) -> dict[str, list[dict[str, Any]]]:
    """Per benchmark one row for each target and group; `by` is `system` or a field of the items.

    ConfigError if no item has that field.
    """
    found: dict[str, Answers] = {}
    fields = {"system"}
    for step in steps:
        target, _, benchmark = step.variant.partition("@")
        now = state(store, step)
        if now.state == "current" and now.artifact is not None:
            answers = found.setdefault(benchmark, {}).setdefault(target, {})
            for sample in read_samples(now.artifact.path / "samples.jsonl"):
                fields |= sample.extra.keys()
                value = sample.system if by == "system" else sample.extra.get(by)
                # "all" is the group of all items, whatever a field may have.
                group = f"{by} {value}" if by == "system" or str(value) == "all" else str(value)
                for name in ("all", *([] if value is None else [group])):
                    answers.setdefault(name, []).append(sample)
    if found and by not in fields:
        raise ConfigError(f"no item has a field {by!r}", f"choose from: {', '.join(sorted(fields))}")
    return {benchmark: list(compared(answers)) for benchmark, answers in found.items()}


def compared(found: Answers) -> Iterator[dict[str, Any]]:
    """Accuracies with intervals; p-values where both were asked the same items.

    They are against the target before, and those of regions against rl, of which they are regions.
    """
    groups = sorted(
        {name for target in found.values() for name in target}, key=lambda name: (name != "all", name)
    )
    before: str | None = None
    for target, answers in found.items():
        against = before if target not in REGIONS else "rl" if "rl" in found else None
        for group in groups:
            if group not in answers:
                continue
            measures = figures(answers[group])
            low, high = measures["interval"] or (None, None)
            test = _tested(found[against].get(group, []), answers[group]) if against else None
            yield {
                "target": target,
                "group": group,
                "n": measures["n"],
                "accuracy": measures["accuracy"],
                "low": low,
                "high": high,
                "flexible": measures["accuracy_flexible"],
                "tokens": measures.get("tokens"),
                **{name: measures[name] for name in OUTCOMES},
                "against": against,
                "p": test.p if test else None,
                "tested": test.n if test else None,
                "change": test.mean if test else None,
            }
        before = before if target in REGIONS else target


def answered_fewer(rows: list[dict[str, Any]]) -> str:
    """Which targets of a benchmark answered fewer items than the others, as a sentence; empty if none did."""
    answered = {row["target"]: row["n"] for row in rows if row["group"] == "all"}
    most = max(answered.values(), default=0)
    fewer = [f"{target} answered {n} of {most} items" for target, n in answered.items() if n < most]
    return f"{', '.join(fewer)}." if fewer else ""


@dataclass(frozen=True)
class Test:
    """A paired test, and the difference of the means, over n items."""

    n: int
    mean: float
    p: float


def _tested(before: list[Sample], after: list[Sample]) -> Test | None:
    """On the items that were graded for both targets."""
    if {sample.id for sample in before} != {sample.id for sample in after}:
        return None
    earlier, now = accuracy_by_item(graded(before)), accuracy_by_item(graded(after))
    both = [item for item in now if item in earlier]
    if not both:
        return None
    one, two = [earlier[item] for item in both], [now[item] for item in both]
    return Test(len(both), fmean(two) - fmean(one), paired_p(one, two))
