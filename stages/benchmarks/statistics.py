"""Intervals and paired tests."""

from collections.abc import Sequence


def wilson(correct: int, n: int) -> tuple[float, float]:
    """95 % Wilson interval of a proportion."""
    from scipy.stats import binomtest

    interval = binomtest(correct, n).proportion_ci(0.95, method="wilson")
    return float(interval.low), float(interval.high)


def paired_p(before: Sequence[bool], after: Sequence[bool]) -> float:
    """Two-sided exact McNemar test of two graders' verdicts on the same items."""
    from scipy.stats import binomtest

    gained = sum(b and not a for a, b in zip(before, after, strict=True))
    lost = sum(a and not b for a, b in zip(before, after, strict=True))
    return float(binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0
