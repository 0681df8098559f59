"""Rows without a response: voted on and rewarded, and neither scored nor imitated."""

import json
from dataclasses import replace
from unittest.mock import Mock

import pytest
from conftest import labels_of, make_step, make_steps

from stages.classify import run as classify
from stages.config import DataSection, ScoreSection, SftSection
from stages.data.rows import read
from stages.errors import DataError
from stages.lora import examples
from stages.pipeline.resolve import resolved
from stages.pipeline.steps import plan_steps
from stages.plan.preflight import problems
from stages.plan.texts import Texts
from stages.records import Example, Labelled, write_jsonl


def _read(tmp_path, *rows, **settings):
    write_jsonl(tmp_path / "rows.jsonl", rows)
    return read(DataSection(path=str(tmp_path / "rows.jsonl"), **settings))


def test_a_row_needs_a_response_or_what_verifies_one(tmp_path):
    null = [{"role": "user", "content": "2 + 3?"}, {"role": "assistant", "content": None}]
    for row in (
        {"question": "2 + 3?", "gold": None},
        {"instruction": "2 + 3?", "context": "", "response": "", "gold": ""},
        {"messages": null[:1], "gold": None},
        {"messages": null},
    ):
        rows = (row | {"gold": 5}, row)
        with pytest.raises(DataError, match="prompt or response is empty") as caught:
            _read(tmp_path, *rows)
        assert "empty: drop leaves out empty ones" in caught.value.hint
        [example] = _read(tmp_path, *rows, empty="drop")
        assert (example.prompt, example.response, example.gold) == ("2 + 3?", "", "5")
    [example] = _read(tmp_path, {"prompt": "Write f.", "test": "assert f()", "entry_point": "f"})
    assert example.response == "" and example.extra["test"] == "assert f()"
    own = {"prompt": "Write f.", "rubric": "short"}  # for a reward of one's own
    assert _read(tmp_path, own, empty="keep")[0].extra == {"rubric": "short"}


def test_rows_with_one_prompt_are_told_apart_by_their_answers(tmp_path):
    rows = [{"prompt": "Any even number?", "gold": gold} for gold in ("2", "4")]
    assert len({example.id for example in _read(tmp_path, *rows)}) == 2
    with pytest.raises(DataError, match="duplicate id"):
        _read(tmp_path, rows[0], rows[0])
    # Votes and labels are filed under the ids of those with a response.
    [example] = _read(tmp_path, {"question": "2 + 3?", "answer": "5\n#### 5"})
    assert example.id == "8bb01108ea572742"


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


ROWS = [
    Labelled(Example(f"r{i}", f"{i}?", "" if i % 3 == 0 else f"#### {i}", str(i)), 1 + i % 2, {})
    for i in range(24)
]


def imitated(sft: SftSection, rows: list[Labelled] = ROWS) -> list[Example]:
    return examples.trained_by_sft(rows, sft, None, 0)[""]


def test_score_and_sft_read_rows_with_a_response():
    for chosen in examples.scored(ROWS, ScoreSection(examples=8), 0)[0].values():
        assert len(chosen) == 8 and all(example.response for example in chosen)
    mixed = imitated(SftSection(system2_share=0.5))
    assert len(mixed) == 8 + 4 and all(example.response for example in mixed)
    taught = imitated(SftSection(system1_targets="answer", system2_share=0.0))
    assert {example.response for example in taught} == {f"#### {i}" for i in range(0, 24, 2)}
    assert len(imitated(SftSection(data="all"))) == 16
    bare = [replace(row, example=replace(row.example, response="")) for row in ROWS if row.system == 2]
    with pytest.raises(DataError, match="none of 12 rows labelled System 2 has a response"):
        examples.scored([*ROWS[::2], *bare], ScoreSection(), 0)
    with pytest.raises(DataError, match="no row has a response for SFT to imitate"):
        imitated(SftSection(data="all"), bare)


@pytest.mark.slow
def test_a_whole_run_learns_from_both_kinds(smoke, tmp_path, demo_data):
    """Half of the rows have their answer alone: RL has them as prompts, score and SFT do not."""
    rows = [json.loads(line) for line in (demo_data / "train.jsonl").read_text().splitlines()][:48]
    slow, fast = ([row for row in rows if row["intended"] == system] for system in (2, 1))
    for row in (*slow[::2], *fast[::2]):
        row["gold"] = row.pop("answer").rpartition("#### ")[2]
    fast[1]["answer"] = "Some."  # cannot be verified, so it is not replayed
    write_jsonl(tmp_path / "mixed.jsonl", rows)
    settings = (f"data.path={tmp_path / 'mixed.jsonl'}", "classify.strategy=known", "classify.known=intended")
    settings += ("score.examples=4", "sft.max_steps=1", "rl.max_steps=1", "rl.system1_share=0.25")
    settings += ("eval.targets=[sft]",)
    config = resolved(smoke(*settings))
    assert problems(Texts(config), list(plan_steps(config).values())) == []
    made = make_steps(config, "classify", "score", "partition", "sft", "rl")
    summaries = {name: artifact.manifest["summary"] for name, (artifact, _) in made.items()}
    without = {1: len(fast[::2]), 2: len(slow[::2])}
    assert len(labels_of(config)) == 48
    assert summaries["score"]["without_response"] == without[1] + without[2]
    rl = {"prompts": len(slow), "replayed_prompts": len(fast) - 1, "unrewardable_prompts": 1}
    assert rl.items() <= summaries["rl"].items()
    assert len(Texts(config).training_rows(config.sft)) == 48 - without[1] - without[2]
