"""What becomes of a voter's answers."""

import pytest

from stages.config import Voter
from stages.engines import ChoiceResult
from stages.errors import AnswerError
from stages.labelling.personas import question_of
from stages.labelling.votes import VoteJournal
from stages.records import Example


class Echo:
    """An engine that gives none of the words to the first questions."""

    def __init__(self, invalid: int) -> None:
        self.invalid = invalid

    def choose_words(self, ballots):
        for i, _ in enumerate(ballots):
            yield i, ChoiceResult((), -1.0, "hm") if i < self.invalid else ChoiceResult((0.3, 0.7), -1.0)


def votes(folder, number: int, words=None, seed=0, **voter) -> VoteJournal:
    voter = Voter(persona="simplicity", words=words, **voter)
    made = VoteJournal(voter, "v", "m", "x", question_of(voter, "m", show_answer=False), seed, folder)
    made.set_examples([Example(str(i), f"Q{i}?", "A", None) for i in range(number)])
    return made


def test_bad_answers_are_counted_among_all_answers(tmp_path, monkeypatch):
    many = votes(tmp_path, 20, samples=5, temperature=0.5, thinking={})
    list(many.ask(Echo(4), print))
    many.check(max_failed=0)  # 4 of 100
    monkeypatch.setattr("stages.labelling.votes.MAX_INVALID", 0.01)
    with pytest.raises(AnswerError, match="4 of 100 answers are none of its words, e.g. 'hm'"):
        many.check(max_failed=0)
    monkeypatch.undo()
    one, two = votes(tmp_path, 20), votes(tmp_path, 20)  # those that another run got count, too
    list(one.ask(Echo(20), print))
    assert list(two.ask(Echo(0), print)) == []  # nothing is asked again
    for each in (one, two):
        with pytest.raises(AnswerError, match="20 of 20 answers are none of its words"):
            each.check(max_failed=0)


def test_other_words_and_another_seed_of_a_voter_that_samples_have_other_votes(tmp_path):
    list(votes(tmp_path, 2).ask(Echo(0), print))
    assert len(votes(tmp_path, 2, words=("simple", "complex")).missing()) == 0
    assert len(votes(tmp_path, 2, words=("easy", "hard")).missing()) == 2
    one, two = (votes(tmp_path, 2, seed=seed, temperature=0.5, thinking={}) for seed in (0, 1))
    assert one.path != two.path
    list(one.ask(Echo(0), print))
    assert len(votes(tmp_path, 2, samples=3, temperature=0.5, thinking={}).missing()) == 4  # the new ones


def test_a_vote_is_the_mean_of_the_valid_samples(tmp_path):
    class Three:
        def choose_words(self, ballots):
            given = [(0.8, 0.2), (0.4, 0.6), ()]
            yield from ((i, ChoiceResult(given[i], -1.0)) for i, _ in enumerate(ballots))

    made = votes(tmp_path, 1, samples=3, temperature=0.5, thinking={})
    list(made.ask(Three(), print))
    assert made.vote(made.examples[0]) == pytest.approx(0.4)
