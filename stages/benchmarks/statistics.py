"""Intervals, paired tests and pass@k."""

from collections.abc import Sequence
from math import comb


def wilson(correct: int, n: int) -> tuple[float, float]:
    """95 % Wilson interval of a proportion."""
    from scipy.stats import binomtest

    interval = binomtest(correct, n).proportion_ci(0.95, method="wilson")
    return float(interval.low), float(interval.high)


def interval(shares: Sequence[float]) -> tuple[float, float]:
    """95 % interval of the mean share of correct answers per item.

    Wilson's where every item is simply right or wrong; else Student's, as answers to one item are not independent.
    """
    if all(share in (0, 1) for share in shares):
        return wilson(sum(map(round, shares)), len(shares))
    from scipy.stats import sem, t

    mean = sum(shares) / len(shares)
    low, high = t.interval(0.95, len(shares) - 1, mean, sem(shares))
    return max(0.0, float(low)), min(1.0, float(high))


def paired_p(before: Sequence[float], after: Sequence[float]) -> float:
    """Two-sided p-value that two targets do equally well on the same items, from each item's share of correct answers.

    Exact McNemar test where every item is simply right or wrong, else Wilcoxon's signed-rank test.
    """
    differences = [b - a for a, b in zip(before, after, strict=True)]
    if not any(differences):
        return 1.0
    from scipy.stats import binomtest, wilcoxon

    if all(difference in (-1, 0, 1) for difference in differences):
        gained, lost = differences.count(1), differences.count(-1)
        return float(binomtest(gained, gained + lost).pvalue)
    return float(wilcoxon(differences).pvalue)


def pass_at(k: int, n: int, correct: int) -> float:
    """Unbiased estimate that one of k answers is correct, from n answers (Chen et al. 2021, arXiv 2107.03374, eq. 1)."""
    return 1 - comb(n - correct, k) / comb(n, k)
