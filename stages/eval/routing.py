"""Routing between two modes: selects each item's answers by its mode, and compares the choices of mode."""

from __future__ import annotations

from dataclasses import replace
from itertools import groupby
from statistics import fmean
from typing import Any

from stages.errors import ArtifactError
from stages.evaluation.metrics import accuracy_metrics
from stages.records import Sample

ORACLE = "oracle"
"""Routing that knows which mode is right: the best that any router could do with these answers."""


def select_answers(samples: dict[str, list[Sample]], modes: dict[str, str]) -> list[Sample]:
    """Return the answers of each item in its mode, in the order of the items; `extra` names the mode.

    samples: the answers by mode, to the same items, else an ArtifactError. modes: mode by item id.
    """
    by_slot = {(mode, s.id, s.sample): s for mode, answers in samples.items() for s in answers}
    slots = [(modes.get(s.id, ""), s.id, s.sample) for s in next(iter(samples.values()))]
    if not by_slot.keys() >= set(slots):
        raise ArtifactError(
            f"the answers of {' and '.join(samples)} are not to the same items",
            "lorapar eval CONFIG --force makes them again",
        )
    return [replace(by_slot[slot], extra={**by_slot[slot].extra, "mode": slot[0]}) for slot in slots]


def compare(samples: dict[str, list[Sample]]) -> dict[str, dict[str, Any]]:
    """Return accuracy and tokens of fast, slow, auto and the oracle, and the share of items answered slowly.

    samples: the answers by routing; those of `fast` and `slow` are the oracle's to choose from.
    """
    oracle = select_answers({mode: samples[mode] for mode in ("fast", "slow")}, _best_modes(samples))
    return {
        name: {**accuracy_metrics(answers), "slow_share": _slow_share(name, answers)}
        for name, answers in {**samples, ORACLE: oracle}.items()
    }


def _best_modes(samples: dict[str, list[Sample]]) -> dict[str, str]:
    """The mode of each item that is right more often or, where both are as often, has fewer tokens."""
    worth: dict[str, dict[str, tuple[float, float]]] = {}
    for mode in ("fast", "slow"):
        by_item = sorted(samples[mode], key=lambda sample: sample.id)
        for id, group in groupby(by_item, key=lambda sample: sample.id):
            answers = list(group)
            tokens = fmean(sample.extra.get("tokens", 0) for sample in answers)
            worth.setdefault(id, {})[mode] = (fmean(sample.correct for sample in answers), -tokens)
    return {id: max(of_item, key=of_item.__getitem__) for id, of_item in worth.items()}


def _slow_share(name: str, answers: list[Sample]) -> float:
    if name in ("fast", "slow"):
        return float(name == "slow")
    return fmean(sample.extra["mode"] == "slow" for sample in answers)
