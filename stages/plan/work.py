"""The work of a step, counted in tokens: a stage's part of the estimate."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from statistics import fmean

SYSTEM1_SHARE = 0.5
"""Share of System 1 among the rows, before they are labelled."""


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
