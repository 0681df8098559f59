"""The demonstration set is what it says.

Answers are right, splits are apart, and no surface feature tells the systems apart.
"""

import re
from collections import Counter

import pytest

from stages.data import demo
from stages.errors import OutputError
from stages.records import read_jsonl

BOUND = 0.25
"""How far an AUC may be from one half."""


@pytest.fixture(scope="module", params=[(size, seed) for size in demo.SETS for seed in (0, 1)])
def drawn(request, tmp_path_factory) -> tuple[str, dict[str, list[dict]]]:
    """The name of a set, and the rows of its splits."""
    size, seed = request.param
    folder = tmp_path_factory.mktemp("demo")
    demo.write(folder, seed, size)
    return size, {name: [r for _, r in read_jsonl(folder / f"{name}.jsonl")] for name in demo.SETS[size]}


@pytest.fixture
def splits(drawn) -> dict[str, list[dict]]:
    return drawn[1]


def auc(rows: list[dict], feature) -> float:
    """The share of pairs in which the System 2 row has the larger value; ties count one half."""
    low, high = (Counter(feature(r["question"]) for r in rows if r["intended"] == k) for k in (1, 2))
    wins = sum(n * m * ((b > a) + 0.5 * (a == b)) for a, n in low.items() for b, m in high.items())
    return wins / low.total() / high.total()


def words(text: str) -> list[str]:
    return re.findall(r"[a-z']+", text.lower())


def test_sizes_and_balance(drawn):
    size, splits = drawn
    kinds = {name: Counter(row["kind"] for row in rows) for name, rows in splits.items()}
    if size == "short":
        train = {"recall": 19, "reading": 29, "one_step": 72, "two_step": 120}
        chains = {"one_step": 100, "two_step": 200}
        assert kinds == {"train": train, "test": chains}
        return
    sizes = {"train": 360, "test": 200, "valid": 400, "final": 1000}
    assert {name: counts.total() for name, counts in kinds.items()} == sizes
    for rows in splits.values():
        assert sum(r["intended"] == 1 for r in rows) * 2 == len(rows)


def test_no_question_is_in_two_splits_and_no_answer_of_an_unseen_one_in_another(splits):
    questions = [{r["question"] for r in rows} for rows in splits.values()]
    assert len(set.union(*questions)) == sum(map(len, questions))
    unseen, others = (
        [row for name, rows in splits.items() if (name in demo.UNSEEN) is which for row in rows]
        for which in (True, False)
    )
    new, worked = ({row["answer"] for row in rows if row["kind"] != "recall"} for rows in (unseen, others))
    assert len(new) > 50 and not new & worked
    new, asked = (
        {row["question"].split(". ")[-1] for row in rows if row["kind"] == "recall"}
        for rows in (unseen, others)
    )
    assert asked and not new & asked


def test_neither_length_nor_a_single_word_tells_the_systems_apart(splits):
    for rows in splits.values():
        for feature in (len, lambda text: len(words(text))):
            assert abs(auc(rows, feature) - 0.5) <= BOUND
        counts = {r["question"]: Counter(words(r["question"])) for r in rows}
        for word in set().union(*counts.values()):
            assert abs(auc(rows, lambda text, w=word, of=counts: of[text][w]) - 0.5) <= BOUND, word


def test_worked_answers_are_right(splits):
    for row in [row for rows in splits.values() for row in rows]:
        lines = row["answer"].split("\n#### ")
        steps = re.findall(r"(\d+) ([-+*]) (\d+) = (\d+)", lines[0])
        expected = {"one_step": 1, "two_step": 2, "three_step": 3}.get(row["kind"], 0)
        assert len(steps) == expected
        for a, sign, b, result in steps:
            assert {"+": int(a) + int(b), "-": int(a) - int(b), "*": int(a) * int(b)}[sign] == int(result)
        for (_, _, _, before), (after, *_) in zip(steps, steps[1:], strict=False):
            assert before == after
        assert (steps[-1][3] if steps else lines[1]) == lines[1]
        assert row["intended"] == (2 if expected > 1 else 1)


def test_a_file_with_other_rows_stays(tmp_path):
    (tmp_path / "train.jsonl").write_text("mine")
    with pytest.raises(OutputError, match="train.jsonl exists already, with other content"):
        demo.write(tmp_path, 7)
    assert [file.read_text() for file in tmp_path.iterdir()] == ["mine"]
    (tmp_path / "train.jsonl").rename(tmp_path / ".train.jsonl")
    assert demo.write(tmp_path, 7) == demo.write(tmp_path, 7)  # the same seed gives the same bytes
    assert (tmp_path / ".train.jsonl").read_text() == "mine"
