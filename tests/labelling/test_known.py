"""Labels that a person brings."""

import json
import logging

import pytest
from conftest import labels_of, make_step

from stages.data.rows import read
from stages.errors import DataError, MissingInputError
from stages.labelling.known import with_known_labels
from stages.pipeline.resolve import resolved
from stages.pipeline.steps import plan_steps
from stages.records import Example, read_labels, write_jsonl

ROWS = [Example(f"id{n}", f"What is {n}?", str(n), str(n), {"system": n % 2 + 1}) for n in range(4)]

BY_ID = json.dumps({"id0": 1, "What is 1?": 2.0, "id2": "System 1", "What is 3? ": "system2"})
LINES = (
    '{"id": "id0", "system": 1}\n{"id": "foreign", "question": "What is 1?", "system": "2"}\n'
    '{"instruction": "id2", "system": 1}\n{"prompt": "What is 3?", "system": 2, "more": 1}\n'
)
CELLS = 'id,question,system\nid0,,1\nx,What is 1?,2\n,"id2",System 1\n,"What is 3?\n",2.0\n'

EXCELS, LIST = "\ufeffid;system\nid0;1\n", '[{"id": "id0", "system": 1}]'


@pytest.mark.parametrize(
    ("name", "text"),
    [("a.json", BY_ID), ("a.jsonl", LINES), ("a.csv", CELLS), ("A.CSV", EXCELS), ("a.json", LIST)],
)
def test_labels_of_a_file_by_id_or_question(tmp_path, name, text):
    (tmp_path / name).write_text(text, encoding="utf-8")
    rows = ROWS if text in (BY_ID, LINES, CELLS) else ROWS[:1]
    systems = [row.system for row in with_known_labels(rows, "system", tmp_path / name)]
    assert systems == [1, 2, 1, 2][: len(rows)]


def test_a_line_in_the_form_of_the_rows_has_their_question(tmp_path):
    """An instruction with its input is another question than the instruction alone."""
    rows = [Example("a", "Translate.\n\ngato", "cat", None), Example("b", "Translate.", "What?", None)]
    lines = [{"instruction": "Translate.", "context": "gato", "system": 2}]
    lines += [{"instruction": None, "id": "b", "system": 1}]  # no text, so it names no row
    lines += [{"question": None, "system": 1}, {"question": "", "system": 2}]
    write_jsonl(tmp_path / "a.jsonl", lines)
    assert [row.system for row in with_known_labels(rows, "system", tmp_path / "a.jsonl")] == [2, 1]


def test_a_row_without_a_label_stays_undecided_and_is_counted(tmp_path, caplog):
    """Also where the cell of a table is empty."""
    (tmp_path / "a.json").write_text('{"id0": 1, "id3": 2, "other": 1, "id1": null}')
    (tmp_path / "a.csv").write_text("id,question,system\n,What is 0?,1\nid3,,2\n,What is 1?,\n")
    for name in ("a.json", "a.csv"):
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="stages.labelling.known"):
            rows = with_known_labels(ROWS, "system", tmp_path / name)
        assert [row.system for row in rows] == [1, None, None, 2]
        assert "2 of 4 examples have no label" in caplog.text


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.json", '{"id0": 3, "id1": "fast"}', r"(?s)2 × label in .*id0: 3.*id1: 'fast'"),
        ("a.json", '{"id0": 1, "id0": 2}', "a field stands twice among id0"),
        ("a.json", '{"id9": 1}', "no label for any of 4 examples"),
        ("a.jsonl", '{"id": "id0"}\n{"system": 1}\n', r"(?s)2 × line without system or without.*:1.*:2"),
        ("a.csv", 'question,voted\n"What\nis it?",1\nWhat?,2\n', r"(?s)without system.*csv:3.*csv:4"),
        ("a.jsonl", '{"instruction": "I", "input": "a", "context": "b", "system": 1}\n', "mean the same"),
    ],
)
def test_a_wrong_file_is_refused(tmp_path, name, text, said):
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=said):
        with_known_labels(ROWS, "system", tmp_path / name)


def test_the_stage_takes_known_labels(smoke, tmp_path):
    file = tmp_path / "mine.json"
    known = ["classify.strategy=known", "data.limit=24"]
    of_field = smoke(*known, "classify.known=intended")
    wanted = {e.id: e.extra["intended"] for e in read(of_field.data)}
    file.write_text(json.dumps(wanted))
    with_file = smoke(*known, f"classify.labels_file={file}")
    made = [make_step(config, "classify:train").manifest for config in (with_file, of_field)]
    assert [one["summary"]["system1"] for one in made] == [list(wanted.values()).count(1)] * 2
    assert {row.example.id: row.system for row in labels_of(with_file)} == wanted
    assert labels_of(of_field) == labels_of(with_file)
    file.write_text(json.dumps({name: 1 for name in wanted}))
    again = make_step(with_file, "classify:train").manifest
    assert again["key"] != made[0]["key"]  # the content counts, not the name
    file.unlink()
    with pytest.raises(MissingInputError, match=f"no file {file}"):
        make_step(with_file, "classify:train")


def test_a_benchmark_may_bring_its_labels_or_be_without(smoke):
    config = smoke("classify.strategy=known", "classify.known=nothing", "data.limit=24")
    artifact = make_step(config, "classify:demo")
    assert artifact.manifest["summary"]["undecided"] == 16
    assert {row.system for row in read_labels(artifact.path / "labels.jsonl")} == {None}
    config = smoke("eval.benchmarks.demo.label=known", "classify.known=intended")
    artifact = make_step(config, "classify:demo")
    rows = read_labels(artifact.path / "labels.jsonl")
    assert [row.system for row in rows] == [row.example.extra["intended"] for row in rows]
    assert {row.system for row in rows} == {1, 2} and not any(row.votes for row in rows)
    # Its field is in the key, whatever labels the training rows.
    brought = "eval.benchmarks.demo.label=known"
    settings = [[brought, "classify.strategy=random", f"classify.known={field}"] for field in "ab"]
    settings += [["classify.known=intended"], [brought, "classify.known=intended"]]
    assert len({plan_steps(resolved(smoke(*one)))["classify:demo"].key for one in settings}) == 4
    with pytest.raises(DataError, match="no label for any of 16 examples in the field nothing"):
        make_step(smoke(brought, "classify.known=nothing"), "classify:demo")


def test_one_question_with_both_labels_is_an_error_unless_ids_tell_the_rows_apart(tmp_path):
    rows = [Example("a", "Q", "short", None, {"id": 7}), Example("b", "Q", "long", None, {"id": "x"})]
    path = tmp_path / "a.jsonl"
    path.write_text('{"question": "Q", "system": 1}\n{"question": "Q", "system": 2}\n')
    with pytest.raises(DataError, match="row with both labels in .*: Q"):
        with_known_labels(rows, "system", path)
    path.write_text('{"question": "Q", "id": 7, "system": 1}\n{"question": "Q", "id": "x", "system": 2}\n')
    assert [row.system for row in with_known_labels(rows, "system", path)] == [1, 2]


def test_test_items_that_are_numbered_like_the_training_rows_get_no_label_of_theirs(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("id,question,system\n0,2 + 2?,1\n1,2 * 3 + 4?,2\n")
    training = Example("b", "2 * 3 + 4?", "10", "10", {"id": 1})
    moved = Example("c", "2 * 3 + 4?", "10", "10", {"id": 0})
    other = Example("d", "(1 + 2) * 3 - 4?", "5", "5", {"id": 0})
    items = with_known_labels([training, moved, other], "system", path, required=False)
    assert [row.system for row in items] == [2, 2, None]
