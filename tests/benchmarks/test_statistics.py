"""Paired tests and differences."""

from itertools import combinations
from math import comb

import pytest
from scipy.stats import ttest_1samp, wilcoxon

from stages.benchmarks.statistics import FEW, holm, interval, paired_difference, paired_p, pass_at, wilson


@pytest.mark.parametrize("parts", [3, 5, 6, 7])
def test_a_test_of_ranks_knows_ties_among_shares(parts):
    """Equal differences are ties wherever they lie: 2/3 - 1/3 and 1/3 - 0 are two floats."""
    counts = [(i % parts, i % parts + 1) for i in range(35)] + [(1 + i % parts, i % parts) for i in range(20)]
    assert len(counts) > FEW
    before, after = ([count / parts for count in side] for side in zip(*counts, strict=True))
    assert len({b - a for a, b in zip(before, after, strict=True)}) > 2
    p = wilcoxon([b - a for a, b in counts]).pvalue
    assert p == pytest.approx(0.043, abs=0.001)
    assert paired_p(before, after) == pytest.approx(p, rel=1e-12)


def test_equal_differences_of_shares_are_seen_as_such():
    found = paired_difference([0, 1 / 3, 2 / 3], [1 / 3, 2 / 3, 1.0])
    assert found == pytest.approx((1 / 3, -2 / 3, 1.0))
    assert interval([1 / 3, 1 - 2 / 3, 2 / 3 - 1 / 3]) == pytest.approx(wilson(1, 3))


@pytest.mark.parametrize(("change", "low", "high"), [(0, -0.3, 0.3), (1, 0.7, 1)])
def test_differences_without_variance_have_an_interval(change, low, high):
    before = [0.0] * 10
    found = paired_difference(before, [b + change for b in before])
    assert found == (change, pytest.approx(low), pytest.approx(high))


def test_holm():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06]) and holm([]) == []


@pytest.mark.parametrize(("differing", "exact"), [(1, 1), (4, 1 / 8), (5, 1 / 16), (7, 1 / 64)])
def test_few_items_that_differ_have_no_smaller_p_than_their_signs_allow(differing, exact):
    before, after = [0.0] * 1000, [1 / 3] * differing + [0.0] * (1000 - differing)
    assert paired_p(before, after) == pytest.approx(exact)


def test_some_more_are_told_by_permutations():
    before, after = [1 / 3] * 200, [2 / 3] * 15 + [0.0] * 5 + [1 / 3] * 180
    signs = sum(comb(20, k) for k in range(6)) / 2**19  # all ranks are equal: a test of signs
    assert paired_p(before, after) == pytest.approx(signs, abs=0.01)


def test_the_interval_of_a_difference_is_that_of_student_s_t():
    before, after = [0, 1 / 3, 1, 0, 2 / 3, 1], [1, 2 / 3, 1, 0, 1, 0.5]
    changes = [b - a for a, b in zip(before, after, strict=True)]
    wanted = ttest_1samp(changes, 0).confidence_interval()
    found = paired_difference(before, after)
    assert found == pytest.approx((sum(changes) / 6, wanted.low, wanted.high))


@pytest.mark.parametrize("correct", [0, 1, 3, 6])
@pytest.mark.parametrize("k", [1, 2, 5])
def test_pass_at_k_is_the_share_of_draws_with_a_right_answer(k, correct):
    answers = [True] * correct + [False] * (6 - correct)
    draws = list(combinations(answers, k))
    assert pass_at(k, 6, correct) == pytest.approx(sum(map(any, draws)) / len(draws))
