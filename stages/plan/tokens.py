"""The tokens of a step before it runs: lengths beside their limits, and the work."""

import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from statistics import fmean

from stages.records import Example

LONGEST = 64
"""Examples with the longest texts that are always in a sample."""
SYSTEM1_SHARE = 0.5
"""Share of System 1 among the rows, before they are labelled."""


class Lengths:
    """Lengths in tokens of one or more texts."""

    def __init__(self, numbers: Iterable[int]) -> None:
        self.ordered = sorted(numbers)
        self.longest = self.ordered[-1]
        self.p99 = self.ordered[math.ceil(0.99 * len(self.ordered)) - 1]
        """The smallest length that at least 99 % of the texts do not exceed."""

    def within(self, limit: int) -> float:
        """The mean length if longer texts are cut at the limit."""
        return fmean(min(number, limit) for number in self.ordered)


@dataclass(frozen=True)
class Span:
    """The lengths of one kind of text, beside the setting that bounds them."""

    name: str
    rows: int
    """All rows of this kind; the lengths may be of a sample of them."""
    lengths: Lengths
    setting: str
    limit: int | None
    """None if nothing bounds them."""
    beyond: str
    """The fate of longer texts: `fail`, `cut`, `drop` …"""
    allowed: float = 0.0
    """Number of rows that may fail."""

    @property
    def longer(self) -> int:
        return sum(self.limit is not None and number > self.limit for number in self.lengths.ordered)

    @property
    def fails(self) -> bool:
        """Whether more are longer than may fail. There may be others outside of the sample."""
        return self.beyond == "fail" and self.longer > self.allowed


def sampled(examples: list[Example], number: int) -> list[Example]:
    """A random sample of `number` examples, always the same, and behind it those with the longest texts."""
    by_length = sorted(examples, key=lambda example: -len(example.conversation) - len(example.response))
    sample = random.Random(0).sample(examples, min(number, len(examples))) + by_length[:LONGEST]
    return list({example.id: example for example in sample}.values())


@dataclass(frozen=True)
class Work:
    trained: float = 0.0
    """Tokens of forward and backward passes."""
    read: float = 0.0
    """Tokens of prompts."""
    written: float = 0.0
    """Tokens of answers."""
    batch: float = 0.0
    """Tokens of the largest batch of a forward and backward pass."""
    slots: int = 0
    """Answers that are generated at a time."""
    length: float = 0.0
    """Tokens of the longest of them, with its prompt."""
    copies: float = 1.0
    """Of the base's weights, in this process."""
    servers: int = 0
    """That are started for it."""


def per_text(texts: Sequence[list[int]], size: int) -> float:
    """Mean tokens that are computed of a text, in batches of `size` that compute a common beginning once."""
    common = sum(1 for _ in takewhile(lambda tokens: len(set(tokens)) == 1, zip(*texts, strict=False)))
    return fmean(map(len, texts)) - common * (1 - 1 / size)
