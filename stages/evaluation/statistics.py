"""Intervals, paired tests and pass@k."""

from collections import Counter
from collections.abc import Sequence
from fractions import Fraction
from math import comb, lcm, sqrt
from statistics import NormalDist
from typing import Any

Z = NormalDist().inv_cdf(0.975)
DECIMALS = 12
"""Of shares and their differences. Two thirds less one third is one number, and another float than one third
less none."""
FINEST = 10_000
"""Parts of an item that a paired test tells apart."""


def wilson(correct: float, n: int) -> tuple[float, float]:
    """95 % Wilson interval of a proportion; `correct` of `n` may be a sum of shares."""

    def least(rate: float) -> float:
        # The lower root, computed from the upper one: at rate 0 it is exactly 0, without a rounding error.
        return rate * rate / (rate + Z * Z / 2 / n + Z * sqrt(rate * (1 - rate) / n + Z * Z / 4 / n / n))

    rate = correct / n
    return least(rate), 1 - least(1 - rate)


def interval(shares: Sequence[float]) -> tuple[float, float]:
    """95 % interval of the mean share of correct answers per item.

    Student's t interval over items where shares differ and some lie between 0 and 1, because answers to one
    item are not independent. Wilson's interval, with items as trials, in two other cases: where every item is
    all right or all wrong, however often it was answered; and where all shares are equal or there is only
    one, so that there is no variance to estimate. In the second case the interval errs on the wide side: a
    mean of shares varies no more than a mean of items that are right or wrong.
    """
    shares = [round(share, DECIMALS) for share in shares]
    if len(set(shares)) == 1 or all(share in (0, 1) for share in shares):
        return wilson(sum(shares), len(shares))
    from scipy.stats import sem, t

    mean = sum(shares) / len(shares)
    low, high = t.interval(0.95, len(shares) - 1, mean, sem(shares))
    return max(0.0, float(low)), min(1.0, float(high))


def _differences(before: Sequence[float], after: Sequence[float]) -> list[float]:
    return [round(b - a, DECIMALS) for a, b in zip(before, after, strict=True)]


def paired_p(before: Sequence[float], after: Sequence[float]) -> float:
    """Two-sided p-value of the hypothesis that two targets do equally well on the same items.

    before, after: each item's share of correct answers. Exact permutation test of the mean: if the targets do
    equally well, each difference could as well have the other sign; p is the share of all choices of signs
    whose sum is as far from zero. Where every difference is -1, 0 or 1 it is the exact McNemar test.
    """
    import numpy as np

    differences = [Fraction(value).limit_denominator(FINEST) for value in _differences(before, after)]
    parts = min(FINEST, lcm(*(value.denominator for value in differences)))
    units = [round(value * parts) for value in differences]
    chances = np.ones(1)  # of each sum of the units, in twos from the least
    for size, number in Counter(abs(unit) for unit in units if unit).items():
        alike = np.zeros(size * number + 1)
        alike[::size] = [comb(number, ways) / 2**number for ways in range(number + 1)]
        chances = alike if len(chances) == 1 else _convolved(chances, alike)
    sums = 2 * np.arange(len(chances)) - (len(chances) - 1)
    return float(np.clip(chances[np.abs(sums) >= abs(sum(units))].sum(), 0, 1))


def _convolved(one: Any, other: Any) -> Any:
    from scipy.signal import convolve  # half a second, and most tests are of one size alone

    return convolve(one, other)


def p_value(p: float) -> str:
    """As a table has it."""
    return "p < .001" if p < 0.001 else f"p = {p:.2g}".replace("= 0.", "= .")


def paired_difference(before: Sequence[float], after: Sequence[float]) -> tuple[float, float, float]:
    """Mean of the differences of the same items, and its 95 % interval by Student's t over items.

    Where all n items differ alike there is no variance to estimate: then 3 / n to both sides, by the rule of
    three.
    """
    from scipy.stats import sem, t

    differences = _differences(before, after)
    number = len(differences)
    mean = sum(differences) / number
    if len(set(differences)) == 1:
        return mean, max(-1.0, mean - 3 / number), min(1.0, mean + 3 / number)
    reach = float(t.ppf(0.975, number - 1)) * float(sem(differences))
    return mean, mean - reach, mean + reach


def holm(values: Sequence[float]) -> list[float]:
    """p-values corrected for their number, by Holm's method."""
    from statsmodels.stats.multitest import multipletests

    return [float(value) for value in multipletests(values, method="holm")[1]] if values else []


def pass_at(k: int, n: int, correct: int) -> float:
    """Unbiased estimate of the probability that one of k answers is correct, from n answers.

    Chen et al. 2021, arXiv 2107.03374, eq. 1.
    """
    return 1 - comb(n - correct, k) / comb(n, k)
