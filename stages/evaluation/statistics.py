"""Confidence intervals, paired significance tests and pass@k."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import comb, lcm, sqrt
from statistics import NormalDist

Z = NormalDist().inv_cdf(0.975)
"""Quantile of the standard normal distribution for two-sided 95 % intervals."""
DECIMALS = 12
"""Decimals to which accuracies and their differences are rounded, so that equal ones are equal floats.

Without it, 2/3 - 1/3 and 1/3 - 0 are two different numbers.
"""
MAX_DENOMINATOR = 10_000
"""The paired test rounds differences of accuracies to multiples of one over this number at the finest."""


@dataclass(frozen=True)
class Interval:
    """95 % interval of a mean, with the p-value of the hypothesis that it is 0 where that is tested."""

    low: float
    high: float
    p: float | None = None


def wilson(correct: float, n: int) -> tuple[float, float]:
    """95 % Wilson interval of a proportion; `correct` of `n` may be a sum of shares."""

    # Not scipy's `binomtest`, which takes whole counts only. Not statsmodels' `proportion_confint`: its lower
    # bound for 0 of 7 is 2.8e-17 instead of 0, and either import costs quick commands more than a second.
    def lower_bound(rate: float) -> float:
        # The bounds are the roots of (1 + Z²/n) x² - (2 rate + Z²/n) x + rate² = 0, whose product is
        # rate² / (1 + Z²/n). The lower root is this product divided by the upper root, which is a sum of
        # positive terms: nothing cancels, and at rate 0 it is exactly 0.
        return rate * rate / (rate + Z * Z / 2 / n + Z * sqrt(rate * (1 - rate) / n + Z * Z / 4 / n / n))

    rate = correct / n
    # The interval of the wrong answers is the mirror image.
    return lower_bound(rate), 1 - lower_bound(1 - rate)


def interval(accuracies: Sequence[float]) -> tuple[float, float]:
    """95 % interval of the mean accuracy, from each item's share of correct answers.

    Student's t interval over items where shares differ and some lie between 0 and 1, because answers to one
    item are not independent. Wilson's interval, with items as trials, in two other cases: where every item is
    all right or all wrong, however often it was answered; and where all shares are equal or there is only
    one, so that there is no variance to estimate. In the second case the interval errs on the wide side: a
    mean of shares varies no more than a mean of items that are right or wrong.
    """
    accuracies = [round(accuracy, DECIMALS) for accuracy in accuracies]
    if len(set(accuracies)) == 1 or all(accuracy in (0, 1) for accuracy in accuracies):
        return wilson(sum(accuracies), len(accuracies))
    low, high = _t_interval(accuracies)
    return max(0.0, low), min(1.0, high)


def _t_interval(values: Sequence[float]) -> tuple[float, float]:
    """95 % interval of the mean by Student's t, of values that are not all equal."""
    from scipy.stats import sem, t  # a second or more, and most intervals are Wilson's

    low, high = t.interval(0.95, len(values) - 1, sum(values) / len(values), sem(values))
    return float(low), float(high)


def _differences(scores_a: Sequence[float], scores_b: Sequence[float]) -> list[float]:
    return [round(b - a, DECIMALS) for a, b in zip(scores_a, scores_b, strict=True)]


def paired_p(scores_a: Sequence[float], scores_b: Sequence[float]) -> float:
    """Two-sided p-value of the hypothesis that two targets do equally well on the same items.

    scores_a, scores_b: each item's share of correct answers. This is the exact permutation test of the mean
    difference: if the targets do equally well, each item's difference could as well have the opposite sign,
    so all 2^n choices of signs are equally likely. p is the share of them whose sum is at least as far from
    zero as the observed one. Where every difference is -1, 0 or 1 it is the exact McNemar test.
    """
    import numpy as np

    # Differences as whole multiples of 1 / denominator: sums of integers are exact, so ties count as ties.
    differences = [Fraction(d).limit_denominator(MAX_DENOMINATOR) for d in _differences(scores_a, scores_b)]
    denominator = min(MAX_DENOMINATOR, lcm(*(difference.denominator for difference in differences)))
    units = [round(difference * denominator) for difference in differences]

    # Under the null hypothesis the sum is S = Σ sᵢ |uᵢ| with independent signs sᵢ = ±1, each of probability
    # 1/2. Let P be the sum of the |uᵢ| with a positive sign: S = P - (Σ |uᵢ| - P) = 2 P - Σ |uᵢ|, so the
    # distribution of P gives that of S. The n items of one magnitude m add m · h to P, where the number of
    # positive signs h is Binomial(n, 1/2). Items of different magnitudes have independent signs, and the
    # distribution of a sum of independent variables is the convolution of their distributions. Enumerating
    # 2^n choices of signs becomes one convolution for each magnitude. Differences of 0 add nothing.
    null = np.ones(1)  # null[k] = probability that P = k; (1 + sum of magnitudes,)
    for magnitude, number in Counter(abs(unit) for unit in units if unit).items():
        binomial = np.zeros(magnitude * number + 1)
        ways = [1]  # number over heads, in integers
        for heads in range(number):
            ways.append(ways[-1] * (number - heads) // (heads + 1))
        binomial[::magnitude] = [n / 2**number for n in ways]
        if len(null) > 1:
            from scipy.signal import convolve  # half a second, and most tests have one magnitude alone

            binomial = convolve(null, binomial)
        null = binomial
    sums = 2 * np.arange(len(null)) - (len(null) - 1)  # S = 2 P - Σ |uᵢ| for each cell of `null`
    # Convolution by FFT has rounding errors, which may lead below 0 or above 1.
    return float(np.clip(null[np.abs(sums) >= abs(sum(units))].sum(), 0, 1))


def p_value(p: float) -> str:
    """Format a p-value for a table: `p = .034` or `p < .001`."""
    return "p < .001" if p < 0.001 else f"p = {p:.2g}".replace("= 0.", "= .")


def paired_difference(scores_a: Sequence[float], scores_b: Sequence[float]) -> tuple[float, float, float]:
    """Mean difference b - a over the same items, and its 95 % interval by Student's t over items.

    Where all n items differ alike there is no variance to estimate: then the interval reaches 3 / n to both
    sides, by the rule of three.
    """
    differences = _differences(scores_a, scores_b)
    number = len(differences)
    mean = sum(differences) / number
    if len(set(differences)) == 1:
        return mean, max(-1.0, mean - 3 / number), min(1.0, mean + 3 / number)
    return mean, *_t_interval(differences)


def over_replicates(means: Sequence[float]) -> Interval | None:
    """Interval and p-value of the mean of replicates, by Student's t with n - 1 degrees of freedom.

    means: one mean for each replicate; if they are means of paired differences, this is the paired t test.
    None where there is no variance to estimate: for a single replicate, or if all means are equal.
    """
    values = [round(mean, DECIMALS) for mean in means]
    if len(set(values)) < 2:
        return None
    from scipy.stats import ttest_1samp  # a second or more

    test = ttest_1samp(values, 0)
    low, high = test.confidence_interval(0.95)
    return Interval(float(low), float(high), float(test.pvalue))


def holm(values: Sequence[float]) -> list[float]:
    """p-values corrected for multiple comparisons by Holm's method."""
    from statsmodels.stats.multitest import multipletests

    return [float(value) for value in multipletests(values, method="holm")[1]] if values else []


def pass_at(k: int, n: int, correct: int) -> float:
    """Unbiased estimate of the probability that one of k answers is correct, from n answers.

    Chen et al. 2021, arXiv 2107.03374, eq. 1.
    """
    return 1 - comb(n - correct, k) / comb(n, k)
