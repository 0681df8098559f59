"""Routing between two modes: selects each item's answers by its mode, and compares the choices of mode."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import groupby
from statistics import fmean
from typing import TYPE_CHECKING, Any

from stages.config import MODES, EvalSection
from stages.errors import ArtifactError
from stages.evaluation.benchmarks import benchmarks
from stages.evaluation.metrics import accuracy_metrics
from stages.records import Example, Sample, read_samples

if TYPE_CHECKING:
    from stages.store.artifacts import Artifact

LABEL = "label"
"""Routing by the items' labels."""
ORACLE = "oracle"
"""Routing that knows which mode is right: the best that any router could do with these answers."""


def select_answers(
    samples: dict[str, list[Sample]], modes: dict[str, str], choice_tokens: int = 0
) -> list[Sample]:
    """Return the answers of each item in its mode, in the order of the items; `extra` names the mode.

    samples: the answers by mode, to the same items, else an ArtifactError. modes: mode by item id.
    choice_tokens: what choosing a mode took.
    """
    by_slot = {(mode, s.id, s.sample): s for mode, answers in samples.items() for s in answers}
    slots = [(modes.get(s.id, ""), s.id, s.sample) for s in next(iter(samples.values()))]
    if not by_slot.keys() >= set(slots):
        raise ArtifactError(
            f"the answers of {' and '.join(samples)} are not to the same items",
            "lorapar eval CONFIG --force makes them again",
        )
    selected = []
    for mode, id, number in slots:
        answer = by_slot[mode, id, number]
        tokens = answer.extra.get("tokens")
        if tokens is not None:
            tokens = {"tokens": tokens + choice_tokens}
        selected.append(replace(answer, extra={**answer.extra, **(tokens or {}), "mode": mode}))
    return selected


Answered = Mapping[str, tuple[float, float]]
"""Item id → share of right answers, and mean tokens of an answer."""


@dataclass(frozen=True)
class Tuning:
    """Items that both modes have answered, on which the threshold of a router is found."""

    items: list[Example]
    fast: Answered
    slow: Answered


def tuning_steps(section: EvalSection) -> tuple[str, ...]:
    """The evaluations of both modes on the rows of `router.tune`."""
    tune = section.router.tune
    return tuple(f"eval:{target}@{tune}" for target in section.modes.values()) if tune else ()


def read_tuning(section: EvalSection, inputs: Mapping[str, Artifact]) -> Tuning | None:
    """Read what both modes answered to the rows of `router.tune`; None if there are none.

    inputs: the artifacts by step.
    """
    if not (tune := section.router.tune):
        return None
    benchmark = section.benchmarks[tune]
    answers = answers_of_modes(section, tune, inputs)
    items = benchmarks.pick(benchmark.kind).load(benchmark)
    return Tuning(items, answered(answers[MODES[0]]), answered(answers[MODES[1]]))


def answers_of_modes(
    section: EvalSection, benchmark: str, inputs: Mapping[str, Artifact]
) -> dict[str, list[Sample]]:
    """Read the graded answers of each mode."""
    return {
        mode: read_samples(inputs[f"eval:{target}@{benchmark}"].path / "samples.jsonl")
        for mode, target in section.modes.items()
    }


def compare(samples: dict[str, list[Sample]]) -> dict[str, dict[str, Any]]:
    """Return accuracy and tokens of each routing, and the share of items that it answers slowly.

    samples: the answers by routing: fast, slow, auto. Two more are made of the first two: the oracle and, if
    all items are labelled, that of the labels.
    """
    modes = {mode: samples[mode] for mode in MODES}
    routings = {**samples, ORACLE: select_answers(modes, _best_modes(modes))}
    systems = {sample.id: sample.system for sample in samples[MODES[0]]}
    if all(systems.values()):
        by_label = {id: MODES[system - 1] for id, system in systems.items() if system}
        routings[LABEL] = select_answers(modes, by_label)
    return {
        name: {**accuracy_metrics(answers), "slow_share": _slow_share(name, answers)}
        for name, answers in routings.items()
    }


def answered(samples: list[Sample]) -> Answered:
    """Sum up the answers to each item."""
    by_item = sorted(samples, key=lambda sample: sample.id)
    results = {}
    for id, group in groupby(by_item, key=lambda sample: sample.id):
        answers = list(group)
        tokens = fmean(sample.extra.get("tokens", 0) for sample in answers)
        results[id] = (fmean(sample.correct for sample in answers), tokens)
    return results


def _best_modes(samples: dict[str, list[Sample]]) -> dict[str, str]:
    """The mode of each item that is right more often or, where both are as often, has fewer tokens."""
    results = {mode: answered(answers) for mode, answers in samples.items()}

    def worth(mode: str, id: str) -> tuple[float, float]:
        right, tokens = results[mode][id]
        return right, -tokens

    return {id: max(results, key=lambda mode: worth(mode, id)) for id in results[MODES[0]]}


def _slow_share(name: str, answers: list[Sample]) -> float:
    if name in MODES:
        return float(name == "slow")
    return fmean(sample.extra["mode"] == "slow" for sample in answers)
