"""The router: signals on a question, and a threshold from labelled rows or from both modes' answers."""

from unittest.mock import Mock

import pytest

from stages.config import ClassifySection, ModelSection, RouterSection
from stages.engines import ChoiceResult
from stages.errors import DataError
from stages.evaluation.routing import Tuning
from stages.labelling.router import ROWS, Router, best_threshold, vote_journal
from stages.records import Example, Labelled


class Base:
    """Votes by the length of the question, if it sees no answer."""

    def choose_words(self, requests):
        for i, request in enumerate(requests):
            assert "SECRET" not in str(request.text)
            question = str(request.text).rpartition("Question: ")[2]
            system2 = min(len(question) / 100, 0.99)
            yield i, ChoiceResult((1 - system2, system2), -1.0)


def _row(number: int, system: int | None) -> Labelled:
    question = f"{number}: " + ("and what then " * 4 if system == 2 else "what")
    return Labelled(Example(f"row {number}", question, "SECRET", None), system, {})


def _router(tmp_path, labels, asked=(), engine=Base, **classify) -> Router:
    section = ClassifySection.model_validate(classify, context=None)
    journal = vote_journal(section, ModelSection(name="m"), "transformers", "id", tmp_path)
    router = Router(RouterSection(), {"vote": journal}, labels, section.seed)
    router.set_questions(list(asked))
    router.collect(lambda signal: engine(), Mock(), "votes", section)
    return router


def test_a_threshold_from_labels_tells_short_questions_from_long_ones(tmp_path):
    labels = [_row(i, 1 + i % 2) for i in range(400)] + [_row(900, None)]
    asked = [_row(1000, 1).example, _row(1001, 2).example]
    voters = [{"model": "teacher"}, {"persona": "effort", "thinking": {}}]
    router = _router(tmp_path, labels, asked, voters=voters)
    router.find_threshold(None)
    voter = router.journals["vote"].voter
    assert voter.persona == "effort" and voter.thinking is None
    assert router.threshold.examples == 2 * ROWS and router.threshold.auc == 1
    assert [router.mode(router.system2(example)) for example in asked] == ["fast", "slow"]
    assert router.mode(None) == "slow"
    line = router.summary()
    assert "slow where vote is above 0." in line and "AUC 1.00 on 128 labelled training rows" in line


def test_a_vote_that_tells_nothing_is_warned_of(tmp_path, caplog):
    labels = [_row(i, 1 + i % 2) for i in range(80)]
    _router(tmp_path, labels).find_threshold(None)
    assert not caplog.text
    swapped = [Labelled(row.example, 3 - row.system, {}) for row in labels]
    _router(tmp_path, swapped).find_threshold(None)
    assert "the vote of role_play hardly tells the systems apart: AUC 0.00, 0.5 is chance" in caplog.text


def test_without_a_voter_that_is_the_base_it_asks_for_steps(tmp_path):
    router = _router(tmp_path, [_row(i, 1 + i % 2) for i in range(40)], voters=[{"model": "teacher"}])
    voter = router.journals["vote"].voter
    assert voter.persona == "steps" and voter.model is None


def test_votes_are_asked_once(tmp_path):
    labels = [_row(i, 1 + i % 2) for i in range(40)]
    _router(tmp_path, labels)
    _router(tmp_path, labels, engine=None)


def test_labels_of_one_system_tell_nothing(tmp_path):
    with pytest.raises(DataError, match="no example is labelled System 2"):
        _router(tmp_path, [_row(i, 1) for i in range(4)])


SIGNALS = {"a": 0.1, "b": 0.2, "c": 0.6, "d": 0.9}
TUNING = Tuning(
    [],
    fast={"a": (1, 2), "b": (0, 2), "c": (0, 2), "d": (0, 2)},
    slow={"a": (0, 10), "b": (0, 10), "c": (1, 10), "d": (1, 10)},
)


def test_a_threshold_from_answers_is_the_most_accurate_and_of_equals_the_cheapest():
    """Fast is right on a, slow on c and d; b costs more for nothing where it is answered slowly."""
    found = best_threshold(SIGNALS, TUNING, None)
    assert found.threshold == pytest.approx(0.4)
    assert (found.accuracy, found.tokens, found.examples) == (0.75, pytest.approx(24 / 40), 4)


@pytest.mark.parametrize(
    ("limit", "threshold", "tokens"), [(0.59, 0.75, 16 / 40), (0.2, 1.0, 8 / 40), (0.1, 1.0, 0.2)]
)
def test_a_limit_of_tokens_is_kept_where_a_threshold_can(limit, threshold, tokens):
    found = best_threshold(SIGNALS, TUNING, limit)
    assert (found.threshold, found.tokens) == (pytest.approx(threshold), pytest.approx(tokens))


def test_an_item_without_a_signal_is_answered_slowly():
    assert best_threshold({**SIGNALS, "d": None}, TUNING, 0.1).tokens == pytest.approx(16 / 40)


def test_several_signals_decide_by_their_mean(tmp_path):
    router = _router(tmp_path, [_row(i, 1 + i % 2) for i in range(40)], [_row(1001, 2).example])
    both = RouterSection(by=["vote", "cascade"], tune="x")
    router.settings = both
    example = _row(1001, 2).example
    assert router.system2(example) is None  # no fast answer
    alone = router.journals["vote"].vote(example)
    router.unsure = {example.id: 0.5}
    assert router.system2(example) == pytest.approx((alone + 0.5) / 2)
