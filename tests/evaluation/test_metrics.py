"""Intervals, paired tests, and the metrics of an evaluation."""

from dataclasses import replace
from itertools import combinations, product

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest, sem, t, ttest_1samp, ttest_rel

from stages.evaluation import statistics
from stages.evaluation.benchmarks import jsonl, mmlu
from stages.evaluation.grading import Context, grade_final_answer
from stages.evaluation.metrics import accuracy_metrics, compute_metrics, headline
from stages.evaluation.statistics import interval, over_replicates, paired_difference, paired_p, wilson
from stages.prompts.answers import matches_gold, same_text
from stages.records import Example, Sample
from stages.report.comparison import compared


def answers(outcomes: dict[str, list[str]]) -> list[Sample]:
    """Per item the outcomes of its answers."""
    return [
        Sample(item, n, None, "", "", None, None, None, outcome == "correct", outcome == "correct", outcome)
        for item, of_item in outcomes.items()
        for n, outcome in enumerate(of_item)
    ]


@pytest.mark.parametrize("shares", [[0.25] * 30, [0.5], [0.0], [1.0] * 20, [1 / 3] * 9, [1.0, 0.0, 1.0]])
def test_without_variance_and_of_right_or_wrong_the_interval_is_wilson_s_over_items(shares):
    mean, n = sum(shares) / len(shares), len(shares)
    low, high = interval(shares)
    assert (low, high) == pytest.approx(wilson(mean * n, n))
    assert (low == 0) == (mean == 0) and (high == 1) == (mean == 1)
    expected = binomtest(round(mean * n), n).proportion_ci(0.95, method="wilson")
    assert wilson(round(mean * n), n) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_the_interval_of_other_shares_is_student_s():
    shares = [0.25, 0.5, 0.75, 0.5, 0.25]
    mean = sum(shares) / 5
    assert interval(shares) == pytest.approx(t.interval(0.95, 4, mean, sem(shares)))
    assert interval([0.0, 0.5]) == (0, 1)


def test_an_item_with_a_refused_answer_counts_neither_way_in_metrics_and_tables():
    samples = answers({"a": ["correct", "refused"], "b": ["correct", "wrong"], "c": ["wrong", "wrong"]})
    whole = compute_metrics(samples, ())["all"]
    assert (whole["n"], whole["answers"], whole["refused"], whole["accuracy"]) == (2, 6, 1, 0.25)
    assert whole["pass@1"] == pytest.approx(0.25)
    (row,) = compared({"base": {"all": samples}})
    assert (row.metrics["n"], row.accuracy.mean, row.metrics["refused"]) == (2, 0.25, 1)
    assert (row.accuracy.over_items.low, row.accuracy.over_items.high) == tuple(whole["interval"])
    samples = answers({"a": ["refused"]})
    whole = compute_metrics(samples, ("subject",))["all"]
    assert [whole[name] for name in ("n", "accuracy", "interval", "macro_over_subject")] == [0, *[None] * 3]
    (row,) = compared({"base": {"all": samples}})
    assert row.accuracy is None and row.change is None


def test_several_answers_groups_and_lengths():
    outcomes = {"a": ["correct"] * 4, "b": ["correct", *["wrong"] * 3], "c": ["wrong"] * 4}
    subject = {"a": "law", "b": "law", "c": "art"}
    samples = [replace(sample, extra={"subject": subject[sample.id]}) for sample in answers(outcomes)]
    whole = compute_metrics(samples, ("subject",))["all"]
    assert whole["n"] == 3 and whole["pass@1"] == pytest.approx((1 + 1 / 4) / 3)
    assert whole["macro_over_subject"] == pytest.approx((1 + 1 / 4) / 2 / 2)
    measures = accuracy_metrics(answers({"a": ["correct"] * 2 + ["wrong"] * 3, "b": ["wrong"] * 5}))
    assert (measures["pass@1"], measures["pass@5"]) == pytest.approx((0.2, 0.5))
    short, long = answers({"a": ["wrong"] * 2})
    lengths = [replace(short, extra={"tokens": 4}), replace(long, extra={"tokens": 10})]
    assert accuracy_metrics(lengths)["tokens"] == 7


@pytest.mark.parametrize(
    ("said", "strict", "flexible"),
    [(" B.", True, True), ("The answer is B.", False, True), ("A", False, False), ("?", False, False)],
)
def test_letters_of_mmlu_and_of_a_file(said, strict, flexible):
    context = Context("hash", False, None)
    found = mmlu.grade(Example("a", "Q", "B", "B", {"subject": "law"}), said, context)
    assert (found.correct, found.correct_flexible) == (strict, flexible)
    found = jsonl.grade(Example("a", "Q", "B", "B", {"grade": "letter"}), f"#### {said}", context)
    assert found.correct is (strict or flexible)


def test_systems_have_their_own_items_and_readings_their_own_accuracy():
    graded = answers({"a": ["correct"], "b": ["wrong"], "c": ["wrong"]})
    of_systems = zip(graded, (1, 2, 2), strict=True)
    samples = [replace(one, system=system, correct_flexible=True) for one, system in of_systems]
    whole = compute_metrics(samples, ())
    assert [(whole[k]["n"], whole[k]["accuracy"]) for k in ("system1", "system2")] == [(1, 1), (2, 0)]
    shown = headline(whole)
    assert (shown["system1"], shown["system2"], shown["all"]["n"]) == (1, 0, 3)
    assert (whole["all"]["accuracy"], whole["all"]["accuracy_flexible"]) == (pytest.approx(1 / 3), 1.0)


def test_both_readings_of_an_answer():
    """Where gold is a letter, the answer in the format is asked first for one, unless texts are compared."""
    letters = [("The answer is B.\n#### done", matches_gold, "B")]
    letters += [("The answer is B.\n#### C", matches_gold, "C"), ("The answer is B. Done", same_text, "Done")]
    for said, equal, flexible in letters:
        guessed = grade_final_answer(Example("a", "Q", "", "B"), said, Context("hash", False), equal)
        assert (guessed.flexible, guessed.correct_flexible) == (flexible, flexible == "B")


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=9), st.integers(6, 7))
def test_p_is_the_share_of_signs_that_lead_as_far(pairs, parts):
    """Against all choices of signs, by whole numbers; 2/3 - 1/3 and 1/3 - 0 are two floats."""
    changes = [b - a for a, b in pairs]
    sums = list(map(sum, product(*((-d, d) for d in changes))))
    exact = sum(abs(one) >= abs(sum(changes)) for one in sums) / len(sums)
    before, after = ([count / parts for count in side] for side in zip(*pairs, strict=True))
    assert paired_p(before, after) == pytest.approx(exact, abs=1e-12)


def test_of_right_and_wrong_it_is_mcnemar_s():
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
