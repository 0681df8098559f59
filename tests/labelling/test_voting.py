"""What becomes of a voter's answers, and of the votes of all."""

import math
from dataclasses import replace
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
from conftest import make_step, make_steps
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.classify import run as classify
from stages.classify.report import check_voters, compare_with_known
from stages.config import ClassifySection, Voter
from stages.engines import ChoiceRequest, ChoiceResult
from stages.errors import AnswerError, DataError
from stages.labelling.aggregate import MIN_EXAMPLES, VoterResult, aggregate, auc, calibrate
from stages.labelling.personas import PersonaContext, personas, question_of, read_labelled_examples, shots_of
from stages.labelling.votes import VoteJournal
from stages.records import Example, Labelled, write_jsonl

SHOTS = shots_of(Voter(persona="steps", shots=4))
EXAMPLE = Example("1", "How many?", "3 + 4 = 7.\n#### 7", "7")


def brief(show: bool = True, **more) -> PersonaContext:
    return PersonaContext("LLaMA-2-7B", show, **more)


@pytest.mark.parametrize("name", personas.names())
@pytest.mark.parametrize("show", [True, False])
def test_a_ballot_shows_the_question_and_the_answer_if_wanted(name, show):
    ballot: ChoiceRequest = personas.pick(name)(EXAMPLE, brief(show, shots=SHOTS))
    text = str(ballot.text)
    assert "How many?" in text
    assert ("3 + 4 = 7." in text.replace("\\n", "\n").split("How many?")[-1]) is show
    assert ballot.words[0] != ballot.words[1]
    ballot = personas.pick(name)(EXAMPLE, brief(show, words=("quick", "slow"), shots=SHOTS))
    assert tuple(word.strip() for word in ballot.words) == ("quick", "slow")
    assert "many" not in str(ballot.text).replace("How many", "") and "System1" not in str(ballot.text)
    bare = personas.pick(name)(Example("a", "2 + 3?", "", "5"), PersonaContext("m", show_answer=True))
    assert "Answer:" not in str(bare.text)  # nothing is shown of a row without a response


def judged(*systems: int) -> list[Labelled]:
    return [Labelled(Example(f"{i}", f"q{i}", f"a{i}", None), system, {}) for i, system in enumerate(systems)]


def test_prompts_name_the_target_and_have_worked_examples_with_their_words():
    text = str(personas.pick("steps")(EXAMPLE, brief(shots=tuple(judged(1, 2)))).text)
    assert "q0\nAnswer: a0\nSteps: one\n" in text and "q1\nAnswer: a1\nSteps: many\n" in text
    assert "You are LLaMA-2-7B" in str(personas.pick("role_play")(EXAMPLE, brief()).text)
    assert "LLaMA" not in str(personas.pick("judge")(EXAMPLE, brief()).text)
    # A heading is no final answer.
    for answer, shown in (("#### First\nAdd.\n#### 7", "\nAnswer: #### First Add."), ("#### 7", "")):
        text = str(personas.pick("steps")(Example("1", "How many?", answer, "7"), brief()).text)
        assert text.endswith(f"Question: How many?{shown}\nSteps:")


def test_labelled_examples_of_a_user(tmp_path):
    """Labels may be written as elsewhere, and an answer may lack; what is none is refused, and named."""
    path = tmp_path / "h.jsonl"
    path.write_text(
        '{"question": "q", "answer": null, "system": 2}\n{"question": "r", "system": "System 1"}\n'
    )
    rows = read_labelled_examples(path)
    assert [(row.system, row.example.response) for row in rows] == [(2, ""), (1, "")]
    with pytest.raises(DataError, match="16 shots need 8 examples of each system, and h.jsonl has 1 and 1"):
        shots_of(Voter(persona="steps", shots_path=str(path)))
    for text, message in (
        ('{"question": "q", "system": 3}', "q: 3"),
        ('{"question": "q", "system": 1}\n{"system": 1}', "h.jsonl:2: field question must be text"),
        ('{"question": "\\ud83d", "system": 1}', "half of a surrogate pair"),
        ('{"question": "q", "system": 1}', "one system only"),
    ):
        path.write_text(text + "\n")
        with pytest.raises(DataError, match=message):
            read_labelled_examples(path)


def labels(*votes: list[float | None], thresholds=(0.5,) * 3, **settings) -> list[int | None]:
    """What becomes of the votes of each voter on row after row."""
    rows = [Example(str(i), f"q{i}", "r", None) for i in range(len(votes[0]))]
    section = ClassifySection(**settings)
    voices = {}
    for voter, (values, threshold) in enumerate(zip(votes, thresholds, strict=False)):
        result = VoterResult({str(i): v for i, v in enumerate(values)}, threshold)
        voices[str(voter)] = result.decided(section.system2_share)
    return [row.system for row in aggregate(rows, voices, section)]


THREE = [0.9, 0.9, 0.1, 0.6], [0.6, 0.2, 0.1, 0.6], [0.1, 0.3, 0.9, 0.1]
FEW = [0.9, 0.9, None], [0.9, None, None], [None, None, None]
AGGREGATED = [
    (THREE, {}, [2, 1, 1, 2]),  # the majority
    (THREE, {"min_agreement": 1}, [None] * 4),
    ([[0.9, 0.9], [0.9, 0.1], [0.9, 0.9]], {"min_agreement": 0.7}, [2, None]),
    # Ties go by the mean probability, and even ones are System 2, whatever the rounding.
    ([[0.9, 0.1, 0.9], [0.6, 0.2, None]], {"min_agreement": 1}, [2, 1, 2]),
    ([[0.9, 0.6, 0.75], [0.3, 0.1, 0.25]], {}, [2, 1, 2]),
    *(([[high, 1 - high], [1 - high, high]], {}, [2, 2]) for high in (0.58, 0.73)),
    (FEW, {"quorum": 0.0}, [2, 2, None]),
    (FEW, {"quorum": 0.5}, [2, None, None]),
    (FEW, {"quorum": 1.0}, [None, None, None]),
    # A known share sets each voter's threshold, which is the last of the share, or whatever ties with it.
    ([[0.01, 0.02, 0.03, 0.04]], {"system2_share": 0.5}, [1, 1, 2, 2]),
    ([[0.99, 0.98, 0.97, 0.96]], {"system2_share": 0.25}, [2, 1, 1, 1]),
    ([[0.3, 0.3, 0.3, 0.3]], {"system2_share": 0.5}, [2, 2, 1, 1]),
    ([[0.1, 0.2, 0.3]], {"system2_share": 0.6}, [1, 2, 2]),  # 1.8 of them
    ([[0, 0, 0, *[1] * 7]], {"system2_share": 0.5}, [1, 1, 1, *[2] * 5, 1, 1]),
    ([[*[0] * 5, *[1] * 5]], {"system2_share": 0.5}, [*[1] * 5, *[2] * 5]),
    ([[i / 10 for i in range(10)]], {"system2_share": 0.5}, [*[1] * 5, *[2] * 5]),
]


@pytest.mark.parametrize(("votes", "settings", "expected"), AGGREGATED)
def test_votes_become_labels(votes, settings, expected):
    assert labels(*votes, **settings) == expected


def test_a_threshold_moves_votes_and_probabilities():
    assert labels([0.7, 0.8, 0.9], [0.4, 0.4, 0.4], thresholds=(0.75, 0.5)) == [1, 1, 2]
    voice = VoterResult({"x": 0.75, "y": 0.0, "z": 1.0}, 0.75)
    assert voice.calibrated("x") == pytest.approx(0.5)
    assert voice.calibrated("y") < 0.001 and voice.calibrated("z") > 0.999


def test_held_out_examples_set_the_threshold_between_the_systems():
    rows = judged(*[1, 2] * 12)
    given = [0.80 if row.system == 2 else 0.70 for row in rows]
    calibration = calibrate(rows, given, by_median=True)
    assert (calibration.threshold, calibration.auc, calibration.examples) == (0.75, 1.0, 24)
    # Hanley and McNeil: 20 twos, 15 of them above all of 10 ones: A = .75, Q1 = .6, Q2 = .642857.
    area, interval = auc([1] * 10, [2] * 15 + [0] * 5)
    assert (area, *interval) == pytest.approx((0.75, 0.573425, 0.926575), abs=1e-5)
    assert calibrate(rows, given, by_median=False).threshold == 0.5
    journal = SimpleNamespace(title="v", voter=Voter(persona="steps", calibration="held_out"))
    with pytest.raises(DataError, match=f"v: {MIN_EXAMPLES} System 1 and 0 System 2 labelled examples"):
        classify._calibrate_voter(journal, judged(*[1] * MIN_EXAMPLES))


@pytest.mark.parametrize(("ones", "twos"), [(24, 24), (4, 28), (60, 2)])
def test_the_threshold_of_a_file_of_any_balance_lies_in_the_middle(ones, twos):
    """Of scores that are symmetric about a half."""

    def spread(number: int, middle: float) -> list[float]:
        return [middle + 0.3 * ((2 * i + 1) / number - 1) for i in range(number)]

    rows, given = judged(*[1] * ones, *[2] * twos), [*spread(ones, 0.4), *spread(twos, 0.6)]
    assert calibrate(rows, given, by_median=True).threshold == pytest.approx(0.5, abs=0.06)


@settings(max_examples=30)
@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=1, max_size=40))
def test_auc_is_the_share_of_pairs_in_order(pairs):
    ones, twos = ([score for score, two in pairs if two is which] for which in (False, True))
    found = auc(ones, twos)
    if not ones or not twos:
        assert found is None
        return
    order = [(high > low) + (high == low) / 2 for high in twos for low in ones]
    assert math.isclose(found[0], sum(order) / len(order)) and found[1][0] <= found[0] <= found[1][1]


def test_agreement_with_known_labels():
    pairs = zip((1, 2, 2, 1), judged(1, 2, 1, None), strict=True)
    rows = [replace(row, example=replace(row.example, extra={"s": known})) for known, row in pairs]
    compared = compare_with_known(rows, "s", {"a": {"0": 0.1, "1": 0.9, "2": 0.4}})
    assert (compared["n"], compared["undecided"], compared["agreement"]) == (3, 1, pytest.approx(2 / 3))
    assert compared["interval"] == pytest.approx([0.20766, 0.93851], abs=1e-4)  # Wilson's of 2 of 3
    assert compared["auc"]["a"][0] == 1 and compare_with_known(rows, "t", {}) is None


def test_only_voters_that_are_all_guessing_are_refused():
    def warnings(accept_weak=False, **areas) -> str:
        figures = {"held_out_interval": (0.4, 0.7), "held_out_examples": 32}
        voters = {title: {"held_out_auc": area, **figures} for title, area in areas.items()}
        lines: list[str] = []
        check_voters(voters, ClassifySection(accept_weak=accept_weak), lines.append)
        return "\n".join(lines)

    with pytest.raises(AnswerError, match="apart: AUC a 0.50, b 0.59 on labelled examples, 0.5 is") as caught:
        warnings(a=0.5, b=0.59)
    assert "classify.accept_weak: true" in caught.value.hint
    warning = "warning: a hardly tells the systems apart: AUC 0.50 [0.40-0.70] on 32 labelled examples"
    for others in ({"b": 0.6}, {"b": None}, {"accept_weak": True}):
        assert warnings(a=0.5, **others) == warning
    assert warnings(a=None) == "" == warnings(a=0.6)


class Echo:
    """An engine that gives the first questions these shares, of which () is none of the words."""

    def __init__(self, *shares: tuple[float, ...]) -> None:
        self.shares = shares

    def choose_words(self, ballots):
        for (i, _), shares in zip(enumerate(ballots), [*self.shares, *[(0.3, 0.7)] * 100], strict=False):
            yield i, ChoiceResult(shares, "hm")


def votes(folder, number: int, words=None, seed=0, **voter) -> VoteJournal:
    voter = Voter(persona="simplicity", words=words, **voter)
    made = VoteJournal(voter, "v", "m", "x", question_of(voter, "m", show_answer=False), seed, folder)
    made.set_examples([Example(str(i), f"Q{i}?", "A", None) for i in range(number)])
    return made


def test_bad_answers_are_counted_among_all_answers(tmp_path, monkeypatch):
    many = votes(tmp_path, 20, samples=5, temperature=0.5, thinking={})
    list(many.ask(Echo(*[()] * 4), print))
    many.check(max_failed=0)  # 4 of 100
    monkeypatch.setattr("stages.labelling.votes.MAX_INVALID", 0.01)
    with pytest.raises(AnswerError, match="4 of 100 answers are none of its words, e.g. 'hm'"):
        many.check(max_failed=0)
    monkeypatch.undo()
    one, two = votes(tmp_path, 20), votes(tmp_path, 20)  # those that another run got count, too
    list(one.ask(Echo(*[()] * 20), print))
    assert list(two.ask(Echo(), print)) == []  # nothing is asked again
    for each in (one, two):
        with pytest.raises(AnswerError, match="20 of 20 answers are none of its words"):
            each.check(max_failed=0)


def test_other_words_and_another_seed_of_a_voter_that_samples_have_other_votes(tmp_path):
    list(votes(tmp_path, 2).ask(Echo(), print))
    assert len(votes(tmp_path, 2, words=("simple", "complex")).missing()) == 0
    assert len(votes(tmp_path, 2, words=("easy", "hard")).missing()) == 2
    one, two = (votes(tmp_path, 2, seed=seed, temperature=0.5, thinking={}) for seed in (0, 1))
    assert one.path != two.path
    list(one.ask(Echo(), print))
    assert len(votes(tmp_path, 2, samples=3, temperature=0.5, thinking={}).missing()) == 4  # the new ones


def test_a_vote_is_the_mean_of_the_valid_samples(tmp_path):
    made = votes(tmp_path, 1, samples=3, temperature=0.5, thinking={})
    list(made.ask(Echo((0.8, 0.2), (0.4, 0.6), ()), print))
    assert made.vote(made.examples[0]) == pytest.approx(0.4)


@pytest.mark.slow
def test_voters_that_are_guessing_stop_the_run_and_no_vote_is_lost(own, monkeypatch):
    """A random model cannot tell known examples apart: nothing is trained on its labels unless asked for."""
    config = own("classify.accept_weak=false", "classify.min_auc=0.99")
    with pytest.raises(AnswerError, match="no voter can tell the systems apart: AUC tiny-random/steps 0[.]"):
        make_steps(config, "classify:train", force=True)
    monkeypatch.setattr("stages.engines.in_process.InProcess.choose_words", None)  # nothing is asked again
    for accepted in ("classify.accept_weak=true", "classify.min_auc=0"):
        make_steps(own("classify.accept_weak=false", accepted), "classify:train", force=True)


def test_votes_with_and_without_an_answer_are_not_mixed(smoke, tmp_path, monkeypatch):
    """One threshold is for prompts of one kind."""
    asked = Mock(side_effect=StopIteration)
    monkeypatch.setattr(classify, "question_of", asked)
    rows = [{"question": f"{i}?", "answer": f"It is {i}."} for i in range(4)]
    for more in ([], [{"question": "9?", "gold": "9"}]):
        write_jsonl(tmp_path / "rows.jsonl", rows + more)
        with pytest.raises(StopIteration):
            make_step(smoke(f"data.path={tmp_path / 'rows.jsonl'}"), "classify:train")
    assert [call.args[2] for call in asked.call_args_list] == [True, False]
