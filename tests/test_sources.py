import datetime
import gzip
import json
import re
from dataclasses import replace
from unittest.mock import Mock

import datasets
import huggingface_hub
import pytest

from stages.config import BenchmarkSection, PromptSection, SourceSection
from stages.data import formats, hub
from stages.data import rows as data
from stages.errors import HUB_HINT, ConfigError, DataError, MissingInputError
from stages.evaluation.benchmarks import humaneval, jsonl, mmlu
from stages.evaluation.grading import Context
from stages.pipeline.outside import digests
from stages.pipeline.stage import stage
from stages.prompts.renderer import Renderer
from stages.records import Labelled, read_labels, write_labels


def written(tmp_path, *rows, name="data.jsonl"):
    text = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    (tmp_path / name).write_text(text)
    return SourceSection(path=str(tmp_path / name))


def read(tmp_path, *rows, **settings):
    return data.read(written(tmp_path, *rows).model_copy(update=settings))


def items(tmp_path, *rows, **settings):
    """Those of a benchmark of one's own."""
    return jsonl.load(BenchmarkSection(path=written(tmp_path, *rows).path, **settings))


def test_gzip_and_byte_order_mark_and_line_separator(tmp_path):
    path = tmp_path / "x.jsonl.gz"
    path.write_bytes(gzip.compress('\ufeff{"question": "a\u2028b", "answer": "A"}\r\n\n'.encode()))
    (example,) = data.read(SourceSection(path=str(path)))
    assert example.prompt == "a\u2028b"
    packed = bytearray(gzip.compress(b'{"question": "Q", "answer": "A"}\n' * 50))
    packed[len(packed) // 2] ^= 0xFF
    path.write_bytes(packed)
    with pytest.raises(DataError, match="damaged gzip file|broken JSON"):
        data.read(SourceSection(path=str(path)))


def test_a_voter_is_the_commit_that_it_names_and_the_examples_that_it_is_shown(smoke, tmp_path):
    commit = "0123456789" * 4
    voter = f"{{model: org/judge, revision: {commit}, engine: transformers, persona: steps}}"
    config = smoke(f"classify.voters=[{voter}]")
    assert digests(config, ["voter:0"]) == {"voter:0": commit}
    written(tmp_path, "1", name="shots.jsonl")
    with_shots = voter.replace("}", f", shots: 2, shots_path: {tmp_path}/shots.jsonl}}")
    shown = smoke(f"classify.voters=[{with_shots}]")
    examples = "rows:classify.voters.0.shots_path"
    assert examples in stage("classify").steps(shown)[0].reads
    before = digests(shown, [examples])
    written(tmp_path, "22", name="shots.jsonl")  # other worked examples in the same file
    assert digests(shown, [examples]) != before


def test_items_of_an_own_benchmark_count_once_and_have_prompt_and_answer(tmp_path):
    """Else two answers to one question would pass for two answers of one item."""
    rows = [{"prompt": "2 + 2?", "answer": 4}, {"prompt": "B?", "answer": "B"}]
    with pytest.raises(DataError, match=r"duplicate id: .*data.jsonl:3 repeats .*data.jsonl:1"):
        items(tmp_path, *rows, rows[0])
    found = items(tmp_path, *rows, rows[0], duplicates="first")
    assert [(example.prompt, example.gold) for example in found] == [("2 + 2?", "4"), ("B?", "B")]
    empty = [{"prompt": prompt, "answer": answer} for prompt, answer in (("P", None), ("P", " "), ("", "A"))]
    empty.append({"prompt": "P", "answer": 0})
    with pytest.raises(DataError, match=r"(?s)3 × bad row.*jsonl:1: prompt or answer is empty"):
        items(tmp_path, *empty)
    assert [item.gold for item in items(tmp_path, *empty, empty="drop")] == ["0"]
    [as_trained] = items(tmp_path, {"question": "2 + 2?", "answer": "4", "by": "me"})
    assert (as_trained.prompt, as_trained.extra) == ("2 + 2?", {"by": "me", "grade": "number"})


def test_rows_of_the_hub(monkeypatch):
    """Dates become texts; without a network the library takes whatever revision it had last."""
    rows = [{"question": f"Q{n}", "answer": "A", "at": datetime.date(2026, 11, n)} for n in (1, 2, 3)]
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: datasets.Dataset.from_list(rows))
    examples = data.read(SourceSection(path="me/rows", limit=2))
    assert [example.extra for example in examples] == [{"at": "2026-11-01"}, {"at": "2026-11-02"}]

    class Loaded(list):
        cache_files = [{"filename": f"/cache/me___rows/default/0.0.0/{'a' * 40}/rows-train.arrow"}]

    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: Loaded([{"question": "Q", "answer": "A"}]))
    assert len(data.read(SourceSection(path="me/rows", revision="a" * 40))) == 1
    with pytest.raises(MissingInputError, match="the local copy of me/rows is commit aaa.*, not bbb"):
        data.read(SourceSection(path="me/rows", revision="b" * 40))


@pytest.mark.parametrize(
    ("error", "hint"),
    [
        (datasets.exceptions.DatasetNotFoundError("Dataset 'owner/set' is a gated dataset"), HUB_HINT),
        (ValueError("Config name is missing."), None),  # a subset that is not named is no fault of the hub
    ],
)
def test_the_hubs_reason_is_told_with_what_to_do(error, hint, monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", Mock(side_effect=error))
    with pytest.raises(MissingInputError, match=re.escape(str(error))) as caught:
        data._hub_rows(SourceSection(path="owner/set"))
    assert caught.value.hint == hint
    refused = OSError("403 Client Error.\n\nCannot access it")
    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", Mock(side_effect=refused))
    told = "no local folder 'owner/gated', and cannot get the model from the hub: Cannot access it"
    with pytest.raises(MissingInputError, match=told) as caught:
        hub.resolve_commit("model", "owner/gated", "main")
    assert caught.value.hint == HUB_HINT


def test_an_answer_is_text_or_a_number_or_true_and_is_graded_by_its_form(tmp_path):
    """The result of a worked answer, as a number; a text as text."""
    with pytest.raises(DataError, match=r"data.jsonl:1: the answer must be text, .*, got list"):
        items(tmp_path, {"prompt": "P", "answer": ["3"]})
    (row,) = read(tmp_path, {"question": "Q", "answer": "So it is.", "gold": True})
    worked = {"prompt": "3 * 4?", "answer": "3 * 4 = 12. #### 12"}
    book = {"prompt": "Which book?", "answer": "1984 by George Orwell", "grade": "text"}
    truth, number, text = items(tmp_path, {"prompt": "P", "answer": True}, worked, book)
    assert row.gold == truth.gold == "true" and truth.extra["grade"] == "text"
    assert (number.gold, number.extra["grade"]) == ("12", "number")
    context = Context("hash", False)
    assert jsonl.grade(number, "3 * 4 = 12.\n#### 12", context).correct
    assert jsonl.grade(text, "#### 1984 by George Orwell.", context).correct
    assert not jsonl.grade(text, "#### 1984 by Aldous Huxley", context).correct


@pytest.mark.parametrize("settings", [{"path": "me/hub-copy", "split": "train"}, {"path": "data.jsonl"}])
def test_worked_examples_are_not_the_rows_that_are_asked(tmp_path, monkeypatch, settings):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data.jsonl").touch()
    with pytest.raises(ConfigError, match="shots of gsm8k would be rows that are asked"):
        data.shots_source(BenchmarkSection(kind="gsm8k", shots=2, **settings))
    other = settings | {"shots_path": "other.jsonl"}
    assert data.shots_source(BenchmarkSection(kind="gsm8k", shots=2, **other)).path == "other.jsonl"


def test_worked_examples_of_an_own_benchmark_may_have_its_form(tmp_path, tokenizer):
    plain = Renderer(tokenizer, PromptSection(template="plain"))
    asked = written(tmp_path, {"prompt": "2 + 2?", "answer": "4"})
    for row in ({"prompt": "1 + 1?", "answer": "2"}, {"question": "1 + 1?", "answer": "It is.\n#### 2"}):
        shown = written(tmp_path, row, name="shots.jsonl")
        section = BenchmarkSection(path=asked.path, shots=1, shots_path=shown.path)
        (one,) = jsonl.ask(jsonl.load(section), section, plain)
        assert one.text.startswith("Question: 1 + 1?") and "#### 2" in one.text
    asked_too = written(tmp_path, {"prompt": "2 + 2?", "answer": 4}, name="b").path
    both = section.model_copy(update={"shots_path": asked_too})
    with pytest.raises(DataError, match=r"a worked example is also a test item: 2 \+ 2\?"):
        jsonl.ask(jsonl.load(both), both, plain)


def test_what_other_benchmarks_want(tmp_path):
    with pytest.raises(DataError, match="data.jsonl:1: field choices is missing"):
        mmlu.load(written(tmp_path, {"subject": "law", "question": "Q", "answer": 0}))
    program = dict.fromkeys(("prompt", "canonical_solution", "test", "entry_point", "task_id"), "def f(): 1")
    with pytest.raises(DataError, match="duplicate id"):
        humaneval.load(written(tmp_path, program, program))


def test_thoughts_of_rows_and_of_messages(tmp_path):
    """By a field or by tags; earlier turns are shown without theirs, and other rows keep their ids."""
    row = {"question": "2 + 2?", "answer": "It is 4.\n#### 4"}
    tagged = row | {"answer": f"<think>\nTwo and two.\n</think>\n\n{row['answer']}"}
    rows = [row | {"reasoning_content": "Two and two."}, tagged, row]
    field, tags, without = (formats.example("gsm8k", row) for row in rows)
    assert (field.response, field.thought, field.extra) == ("It is 4.\n#### 4", "Two and two.", {})
    assert replace(tags, id="") == replace(field, id="") and without.thought == ""
    assert tags.id == field.id != without.id
    said = [("user", "a?"), ("assistant", "<think>x</think>A"), ("user", "b?"), ("assistant", "B")]
    messages = [{"role": role, "content": text} for role, text in said]
    messages[-1]["reasoning"] = "Hm."
    last = formats.example("messages", {"messages": messages})
    assert (last.turns, last.response, last.thought) == ([["a?", "A"]], "B", "Hm.")
    write_labels(tmp_path / "labels.jsonl", [Labelled(one, 1, {}) for one in (last, without)])
    assert [row.example for row in read_labels(tmp_path / "labels.jsonl")] == [last, without]
    assert (tmp_path / "labels.jsonl").read_text().count('"thought"') == 1


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
            read(tmp_path, *rows)
        assert "empty: drop leaves out empty ones" in caught.value.hint
        [example] = read(tmp_path, *rows, empty="drop")
        assert (example.prompt, example.response, example.gold) == ("2 + 3?", "", "5")
    [example] = read(tmp_path, {"prompt": "Write f.", "test": "assert f()", "entry_point": "f"})
    assert example.response == "" and example.extra["test"] == "assert f()"
    own = {"prompt": "Write f.", "rubric": "short"}  # for a reward of one's own
    assert read(tmp_path, own, empty="keep")[0].extra == {"rubric": "short"}


def test_rows_with_one_prompt_are_told_apart_by_their_answers(tmp_path):
    rows = [{"prompt": "Any even number?", "gold": gold} for gold in ("2", "4")]
    assert len({example.id for example in read(tmp_path, *rows)}) == 2
    with pytest.raises(DataError, match="duplicate id"):
        read(tmp_path, rows[0], rows[0])
    # Votes and labels are filed under the ids of those with a response.
    [example] = read(tmp_path, {"question": "2 + 3?", "answer": "5\n#### 5"})
    assert example.id == "8bb01108ea572742"
