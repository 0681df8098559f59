"""The router: one vote of the base, with a threshold from labelled rows."""

import pytest

from stages.config import ClassifySection, ModelSection
from stages.engines import ChoiceResult
from stages.errors import DataError
from stages.labelling.router import ROWS, Router
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


def _router(tmp_path, labels, **classify) -> Router:
    section = ClassifySection.model_validate(classify, context=None)
    router = Router(section, ModelSection(name="m"), "transformers", "id", labels, tmp_path)
    router.set_questions([])
    for _ in router.journal.ask(Base(), print):
        pass
    return router


def test_a_threshold_from_labels_tells_short_questions_from_long_ones(tmp_path):
    labels = [_row(i, 1 + i % 2) for i in range(400)] + [_row(900, None)]
    router = _router(tmp_path, labels, voters=[{"model": "teacher"}, {"persona": "effort", "thinking": {}}])
    calibration = router.calibrate()
    assert router.journal.voter.persona == "effort" and router.journal.voter.thinking is None
    assert calibration.examples == 2 * ROWS and calibration.auc == 1
    [(_, short)] = Base().choose_words([router.request(_row(1000, 1).example)])
    [(_, long)] = Base().choose_words([router.request(_row(1001, 2).example)])
    assert [router.mode(vote.probabilities[1]) for vote in (short, long)] == ["fast", "slow"]
    assert router.mode(None) == "slow"
    assert (
        "slow above 0." in router.summary() and "AUC 1.00 on 128 labelled training rows" in router.summary()
    )


def test_a_vote_that_tells_nothing_is_warned_of(tmp_path, caplog):
    labels = [_row(i, 1 + i % 2) for i in range(80)]
    _router(tmp_path, labels).calibrate()
    assert not caplog.text
    swapped = [Labelled(row.example, 3 - row.system, {}) for row in labels]
    _router(tmp_path, swapped).calibrate()
    assert "the vote of role_play hardly tells the systems apart: AUC 0.00, 0.5 is chance" in caplog.text


def test_without_a_voter_that_is_the_base_it_asks_for_steps(tmp_path):
    router = _router(tmp_path, [_row(i, 1 + i % 2) for i in range(40)], voters=[{"model": "teacher"}])
    assert router.journal.voter.persona == "steps" and router.journal.voter.model is None


def test_votes_are_asked_once(tmp_path):
    labels = [_row(i, 1 + i % 2) for i in range(40)]
    _router(tmp_path, labels)
    again = Router(ClassifySection(), ModelSection(name="m"), "transformers", "id", labels, tmp_path)
    again.set_questions([])
    assert again.journal.missing() == []


def test_labels_of_one_system_tell_nothing(tmp_path):
    with pytest.raises(DataError, match="no example is labelled System 2"):
        _router(tmp_path, [_row(i, 1) for i in range(4)])
