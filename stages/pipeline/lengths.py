"""How long rows are, in tokens."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property


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
    limit: int
    beyond: str
    """What becomes of longer ones."""
