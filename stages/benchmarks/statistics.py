"""Intervals, paired tests and pass@k."""

from collections.abc import Sequence
from math import comb, sqrt
from statistics import NormalDist

Z = NormalDist().inv_cdf(0.975)
FEW, PERMUTATIONS = 50, 9999
"""Items that differ, and how many permutations of their signs are drawn: of up to 13 items all there are."""
DECIMALS = 12
"""Of shares and their differences. Two thirds less one third is one number, and another float than one third
less none: unrounded, a test of ranks would tell ties apart by their rounding errors."""


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

    before, after: each item's share of correct answers. Exact McNemar test where every difference is -1, 0 or
    1, else Wilcoxon's signed-rank test over the items that differ: where they are FEW, by permutations, as a
    normal approximation then gives p-values too small.
    """
    differing = [difference for difference in _differences(before, after) if difference]
    if len(differing) < 2:
        return 1.0
    from scipy.stats import PermutationMethod, binomtest, wilcoxon

    if all(difference in (-1, 1) for difference in differing):
        return float(binomtest(differing.count(1), len(differing)).pvalue)
    few = PermutationMethod(n_resamples=PERMUTATIONS, rng=0) if len(differing) <= FEW else "asymptotic"
    return float(wilcoxon(differing, method=few).pvalue)


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
