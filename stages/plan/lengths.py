"""How long rows are, in tokens, and which of many rows tell of it."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from stages.records import Example

SAMPLE, LONGEST = 5000, 64
"""Rows from which lengths are taken: some drawn at random, and those of the longest texts."""


@dataclass(frozen=True)
class Lengths:
    """Numbers of tokens over rows, of which there is at least one."""

    ordered: tuple[int, ...]

    @classmethod
    def of(cls, numbers: Iterable[int]) -> Lengths:
        return cls(tuple(sorted(numbers)))

    def reached_by(self, share: float) -> int:
        """The length that this share of the rows does not exceed."""
        return self.ordered[math.ceil(share * len(self.ordered)) - 1]

    @property
    def median(self) -> int:
        return self.reached_by(0.5)

    @property
    def p99(self) -> int:
        return self.reached_by(0.99)

    @property
    def longest(self) -> int:
        return self.ordered[-1]

    @cached_property
    def mean(self) -> float:
        return sum(self.ordered) / len(self.ordered)

    def beyond(self, limit: int) -> int:
        """How many rows are longer."""
        return sum(number > limit for number in self.ordered)

    def within(self, limit: int) -> float:
        """The mean where longer ones end at the limit."""
        return sum(min(number, limit) for number in self.ordered) / len(self.ordered)


@dataclass(frozen=True)
class Span:
    """Lengths beside the setting that bounds them."""

    what: str
    rows: int
    """How many there are; the lengths may be of a sample of them."""
    lengths: Lengths
    setting: str
    limit: int | None
    """None if nothing bounds them."""
    beyond: str
    """What becomes of longer ones."""

    @property
    def longer(self) -> int:
        """How many are beyond the limit."""
        return 0 if self.limit is None else self.lengths.beyond(self.limit)


def drawn(examples: list[Example], number: int) -> list[Example]:
    """So many of them at random, always the same, or all."""
    return random.Random(0).sample(examples, min(number, len(examples)))


def sampled(examples: list[Example], number: int | None = None) -> list[Example]:
    """So many at random, or SAMPLE, and those of the longest texts."""
    by_length = sorted(examples, key=lambda example: -len(example.prompt) - len(example.response))
    chosen = [*drawn(examples, SAMPLE if number is None else number), *by_length[:LONGEST]]
    return list({example.id: example for example in chosen}.values())
