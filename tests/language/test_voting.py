import pytest

from stages.engines import Ballot
from stages.language.voting import SHOTS, Target, decide, personas
from stages.records import Example

EXAMPLE = Example("1", "How many?", "3 + 4 = 7.\n#### 7", "7")


@pytest.mark.parametrize("name", personas.names())
@pytest.mark.parametrize("show", [True, False])
def test_a_ballot_shows_the_question_and_the_answer_if_wanted(name, show):
    ballot: Ballot = personas.pick(name)(EXAMPLE, Target("LLaMA-2-7B", show))
    text = str(ballot.text)
    assert "How many?" in text
    assert ("3 + 4 = 7." in text.replace("\\n", "\n").split("How many?")[-1]) is show
    assert ballot.words[0] != ballot.words[1]


def test_role_play_names_the_target():
    assert "You are LLaMA-2-7B" in str(personas.pick("role_play")(EXAMPLE, Target("LLaMA-2-7B", True)).text)
    assert "LLaMA" not in str(personas.pick("judge")(EXAMPLE, Target("LLaMA-2-7B", True)).text)


def test_few_shot_examples_come_in_pairs():
    for fast, slow in SHOTS:
        assert fast[0] != slow[0]


def examples(count: int) -> list[Example]:
    return [Example(str(i), f"q{i}", "r", None) for i in range(count)]


def labels(votes: dict[str, list[float]], share=None, agreement=0.0) -> list[int | None]:
    rows = examples(len(next(iter(votes.values()))))
    given = {voter: {str(i): v for i, v in enumerate(values)} for voter, values in votes.items()}
    return [row.system for row in decide(rows, given, share, agreement)]


def test_majority_of_three():
    assert labels({"a": [0.9, 0.9, 0.1], "b": [0.6, 0.2, 0.1], "c": [0.1, 0.3, 0.9]}) == [2, 1, 1]


def test_ties_go_by_the_mean_probability():
    assert labels({"a": [0.9, 0.6, 0.75], "b": [0.3, 0.1, 0.25]}) == [2, 1, 2]


def test_agreement_below_the_minimum_is_undecided():
    votes = {"a": [0.9, 0.9], "b": [0.9, 0.1], "c": [0.9, 0.9]}
    assert labels(votes, agreement=0.7) == [2, None]


def test_a_known_share_sets_each_voter_s_threshold():
    assert labels({"a": [0.01, 0.02, 0.03, 0.04]}, share=0.5) == [1, 1, 2, 2]
    assert labels({"a": [0.99, 0.98, 0.97, 0.96]}, share=0.25) == [2, 1, 1, 1]
    assert labels({"a": [0.3, 0.3, 0.3, 0.3]}, share=0.5) == [2, 2, 1, 1]
