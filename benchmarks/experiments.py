"""The experiments whose answers or values are kept. Their contrasts stand in docs/results/contrasts.csv."""

import math
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Experiment:
    """`kinds` of its items, the `benchmarks` that hold them, and `modes`: the arms fast, auto and slow."""

    kinds: tuple[str, str] = ("System 1", "System 2")
    benchmarks: tuple[str, ...] = ("final",)
    modes: tuple[str, ...] = ()


_STEPS, _DEMO = ("one step", "two steps"), ("demo",)
EXPERIMENTS = {
    "rl-elements": Experiment(),
    "sft-elements": Experiment(),
    "raft": Experiment(),
    "counts": Experiment(),
    "default": Experiment(),
    "protect": Experiment(("old", "new"), ("old", "new")),
    "unlike": Experiment(("instructions", "chains"), ("recall", "chains")),
    "demo-first": Experiment(_STEPS, _DEMO, ("sft", "auto", "rl")),
    "demo": Experiment(_STEPS, _DEMO, ("sft", "auto", "rl")),
    "modes": Experiment(_STEPS, _DEMO, ("rl fast", "rl auto", "rl slow")),
}
"""By the name of their files in docs/results: NAME-items.json.gz, else NAME.csv, then kept by hand."""
MODES_ARMS = {
    "base": "base, four examples",
    "sft plain 96": "plain SFT, 96 steps",
    "sft plain 180": "plain SFT, 180 steps",
    "rl none": "no modes, SFT and RL",
    "mixture": "`fast` or `slow` at random, tokens as `auto`",
    "words": "mode by the question's words",
    "sft auto": "`auto` after SFT",
    "rl fast": "`fast`",
    "rl auto": "`auto`",
    "rl slow": "`slow`",
}
"""Rows of README's table of modes: the simplest things first."""


def systems_by_words(rows: Iterable[tuple[str, int]], questions: Iterable[str]) -> list[int]:
    """Guess the system of each question by its words alone: naive Bayes on labelled rows."""
    seen: dict[int, Counter[str]] = {1: Counter(), 2: Counter()}
    for text, system in rows:
        seen[system].update(["", *_words(text)])  # "" counts rows

    def evidence(system: int, text: str) -> float:
        number = seen[system][""]
        return math.log(number + 1) + sum(
            math.log((seen[system][w] + 1) / (number + 2)) for w in _words(text)
        )

    return [max((1, 2), key=lambda system: evidence(system, text)) for text in questions]


def _words(text: str) -> set[str]:
    return set(re.findall("[a-z]+", text.lower()))
