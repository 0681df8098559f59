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


@pytest.fixture(scope="module", params=[0, 1], ids="seed {}".format)
def splits(request, tmp_path_factory) -> dict[str, list[dict]]:
    folder = tmp_path_factory.mktemp("demo")
    demo.write(folder, request.param)
    return {name: [row for _, row in read_jsonl(folder / f"{name}.jsonl")] for name in demo.SPLITS}


def auc(rows: list[dict], feature) -> float:
    """The share of pairs in which the System 2 row has the larger value; ties count one half."""
    low, high = (Counter(feature(r["question"]) for r in rows if r["intended"] == k) for k in (1, 2))
    wins = sum(n * m * ((b > a) + 0.5 * (a == b)) for a, n in low.items() for b, m in high.items())
    return wins / low.total() / high.total()


def words(text: str) -> list[str]:
    return re.findall(r"[a-z']+", text.lower())


def test_no_question_or_worked_answer_is_in_two_splits(splits):
    assert {name: len(rows) for name, rows in splits.items()} == {"train": 240, "test": 300}
    questions = {row["question"] for rows in splits.values() for row in rows}
    assert len(questions) == 540 and sum(row["intended"] == 1 for row in splits["train"]) == 120
    worked, unseen = ({row["answer"] for row in rows} for rows in splits.values())
    assert len(unseen) > 50 and not worked & unseen


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
        expected = demo.STEPS.get(row["kind"], 0)
        assert len(steps) == expected
        for a, sign, b, result in steps:
            assert {"+": int(a) + int(b), "-": int(a) - int(b), "*": int(a) * int(b)}[sign] == int(result)
        for (_, _, _, before), (after, *_) in zip(steps, steps[1:], strict=False):
            assert before == after
        assert (steps[-1][3] if steps else lines[1]) == lines[1]
        assert row["intended"] == (2 if expected > 1 else 1)


def test_few_two_step_rows_of_one_file_are_worked(tmp_path):
    demo.write(tmp_path, 0)
    full, few = ([row for _, row in read_jsonl(tmp_path / f"{name}.jsonl")] for name in ("train", demo.FEW))
    assert Counter(row["kind"] for row in few if "answer" in row)["two_step"] == demo.WORKED
    for row, other in zip(full, few, strict=True):
        gold = row["answer"].rpartition("#### ")[2]
        assert other == row or (
            row["kind"] == "two_step" and {**other, "answer": row["answer"]} == {**row, "gold": gold}
        )


def test_the_same_seed_gives_the_same_bytes_and_a_file_with_other_rows_stays(tmp_path):
    assert demo.write(tmp_path, 7) == demo.write(tmp_path, 7)
    (tmp_path / "train.jsonl").write_text("mine")
    with pytest.raises(OutputError, match="train.jsonl exists already, with other content"):
        demo.write(tmp_path, 7)
    assert (tmp_path / "train.jsonl").read_text() == "mine"
