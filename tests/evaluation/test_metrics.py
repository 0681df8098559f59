"""Intervals at their edges, and refused answers, which drop their item from metrics and tables alike."""

from dataclasses import replace

import pytest
from scipy.stats import binomtest, sem, t

from stages.evaluation.benchmarks import jsonl, mmlu
from stages.evaluation.grading import Context, grade_final_answer
from stages.evaluation.metrics import accuracy_metrics, compute_metrics, headline
from stages.evaluation.statistics import interval, wilson
from stages.prompts.answers import matches_gold, same_text
from stages.records import Example, Sample
from stages.report.comparison import compared


def answers(outcomes: dict[str, list[str]]) -> list[Sample]:
    """Per item the outcomes of its answers."""
    return [
        Sample(item, n, None, "", "", None, None, None, outcome == "correct", outcome == "correct", outcome)
        for item, given in outcomes.items()
        for n, outcome in enumerate(given)
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
    assert (row.n, row.accuracy.mean, row.outcomes["refused"]) == (2, 0.25, 1)
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
    given = answers({"a": ["correct"], "b": ["wrong"], "c": ["wrong"]})
    of_systems = zip(given, (1, 2, 2), strict=True)
    samples = [replace(one, system=system, correct_flexible=True) for one, system in of_systems]
    whole = compute_metrics(samples, ())
    assert [(whole[k]["n"], whole[k]["accuracy"]) for k in ("system1", "system2")] == [(1, 1), (2, 0)]
    shown = headline(whole)
    assert (shown["system1"], shown["system2"], shown["all"]["n"]) == (1, 0, 3)
    assert (whole["all"]["accuracy"], whole["all"]["accuracy_flexible"]) == (pytest.approx(1 / 3), 1.0)


def test_both_readings_of_an_answer():
    guessed = grade_final_answer(Example("a", "Q", "", "18"), "The answer is 18", Context("hash", False))
    assert (guessed.strict, guessed.flexible) == (None, "18")
    assert (guessed.correct, guessed.correct_flexible) == (False, True)
    # Where gold is a letter, the answer in the format is asked first for one, unless texts are compared.
    letters = [("The answer is B.\n#### done", matches_gold, "B")]
    letters += [("The answer is B.\n#### C", matches_gold, "C"), ("The answer is B. Done", same_text, "Done")]
    for said, equal, flexible in letters:
        guessed = grade_final_answer(Example("a", "Q", "", "B"), said, Context("hash", False), equal)
        assert (guessed.flexible, guessed.correct_flexible) == (flexible, flexible == "B")
