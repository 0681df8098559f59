"""Lengths of texts in tokens, beside the limits that they have to keep."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import fmean

from stages.records import Example

LONGEST = 64
"""Examples with the longest texts that are always in a sample."""


class Lengths:
    """Lengths in tokens of one or more texts."""

    def __init__(self, numbers: Iterable[int]) -> None:
        self.ordered = sorted(numbers)
        self.median, self.p99 = self._quantile(0.5), self._quantile(0.99)
        self.mean, self.longest = fmean(self.ordered), self.ordered[-1]

    def _quantile(self, share: float) -> int:
        """Nearest rank: the smallest length that at least this share of the texts do not exceed."""
        return self.ordered[math.ceil(share * len(self.ordered)) - 1]

    def beyond(self, limit: int) -> int:
        """The number of texts that are longer than the limit."""
        return sum(number > limit for number in self.ordered)

    def within(self, limit: int) -> float:
        """The mean length if longer texts are cut at the limit."""
        return fmean(min(number, limit) for number in self.ordered)

    def summary(self) -> dict[str, float]:
        return {"mean": self.mean, "median": self.median, "p99": self.p99, "longest": self.longest}


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
        return 0 if self.limit is None else self.lengths.beyond(self.limit)

    @property
    def fails(self) -> bool:
        """Whether more are longer than may fail. There may be others outside of the sample."""
        return self.beyond == "fail" and self.longer > self.allowed


def sampled(examples: list[Example], number: int) -> list[Example]:
    """A random sample of `number` examples, always the same, and behind it those with the longest texts."""
    by_length = sorted(examples, key=lambda example: -len(example.conversation) - len(example.response))
    sample = random.Random(0).sample(examples, min(number, len(examples))) + by_length[:LONGEST]
    return list({example.id: example for example in sample}.values())
