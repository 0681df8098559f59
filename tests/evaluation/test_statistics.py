"""Paired tests and differences."""

from itertools import combinations, product

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest, ttest_1samp, ttest_rel

from stages.evaluation import statistics
from stages.evaluation.statistics import over_replicates, paired_difference, paired_p


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=9), st.integers(6, 7))
def test_p_is_the_share_of_signs_that_lead_as_far(pairs, parts):
    """Against all choices of signs, by whole numbers; 2/3 - 1/3 and 1/3 - 0 are two floats."""
    changes = [b - a for a, b in pairs]
    sums = list(map(sum, product(*((-d, d) for d in changes))))
    exact = sum(abs(one) >= abs(sum(changes)) for one in sums) / len(sums)
    before, after = ([count / parts for count in side] for side in zip(*pairs, strict=True))
    assert paired_p(before, after) == pytest.approx(exact, abs=1e-12)


def test_of_right_and_wrong_it_is_mcnemar_s():
    """Seven won, one lost, two equal: 2 (C(8,0) + C(8,1)) / 2^8."""
    before, after = [1, *[0] * 7, 1, 1], [0, *[1] * 7, 1, 1]
    assert paired_p(before, after) == pytest.approx(18 / 256, abs=1e-12)
    many = [0] * 300 + [1] * 200, [1] * 300 + [0] * 200
    assert paired_p(*many) == pytest.approx(binomtest(300, 500).pvalue, rel=1e-6)
    assert paired_p([0.5, 0.5], [0.5, 0.5]) == paired_p([], []) == 1
    assert paired_p([0.0] * 7, [1 / 250] * 7) == pytest.approx(1 / 64)  # each of one answer in 250
    few = [0.0] * 1000, [1 / 3] * 7 + [0.0] * 993  # p is no smaller than the signs of seven allow
    assert paired_p(*few) == pytest.approx(1 / 64)


def test_the_interval_of_a_difference_is_that_of_student_s_t_or_by_the_rule_of_three():
    assert paired_difference([0, 1 / 3, 2 / 3], [1 / 3, 2 / 3, 1.0]) == pytest.approx((1 / 3, -2 / 3, 1.0))
    assert paired_difference([0.0] * 10, [0.0] * 10) == pytest.approx((0, -0.3, 0.3))
    assert paired_difference([0.0] * 10, [1.0] * 10) == pytest.approx((1, 0.7, 1))
    before, after = [0, 1 / 3, 1, 0, 2 / 3, 1], [1, 2 / 3, 1, 0, 1, 0.5]
    changes = [b - a for a, b in zip(before, after, strict=True)]
    expected = ttest_1samp(changes, 0).confidence_interval()
    assert paired_difference(before, after) == pytest.approx((sum(changes) / 6, expected.low, expected.high))


def test_the_interval_over_replicates_is_that_of_the_paired_t_test_and_holm_corrects():
    before, after = [0.51, 0.62, 0.48, 0.55], [0.56, 0.61, 0.58, 0.6]
    test = ttest_rel(after, before)
    interval_over = over_replicates([b - a for a, b in zip(before, after, strict=True)])
    assert (interval_over.low, interval_over.high) == pytest.approx(tuple(test.confidence_interval()))
    assert interval_over.p == pytest.approx(test.pvalue)
    assert over_replicates([0.1]) is over_replicates([0.1, 0.1, 0.4 - 0.3]) is None  # no variance
    assert statistics.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert statistics.holm([]) == []


@pytest.mark.parametrize(("k", "correct"), [(1, 0), (1, 3), (2, 1), (5, 1), (5, 6)])
def test_pass_at_k_is_the_share_of_draws_with_a_right_answer(k, correct):
    draws = list(combinations([True] * correct + [False] * (6 - correct), k))
    assert statistics.pass_at(k, 6, correct) == pytest.approx(sum(map(any, draws)) / len(draws))
