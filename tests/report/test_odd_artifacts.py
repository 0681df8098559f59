"""Artifacts that lack what others have are shown all the same, and what no stage writes is named."""

import json
from dataclasses import asdict
from types import SimpleNamespace

import pytest

from lorapar_cli import terminal
from stages.errors import ArtifactError
from stages.records import Sample, read_labels, read_samples, write_jsonl
from stages.report import card, comparison, provenance, run_page, voters
from stages.store.artifacts import Artifact


def test_a_field_of_the_rows_that_is_called_why(tmp_path, capsys):
    row = Sample("a", 0, None, "Q", "A", None, "A", "A", True, True, "correct", {"why": "it is so"})
    write_jsonl(tmp_path / "samples.jsonl", [asdict(row)])
    terminal.samples(Artifact(tmp_path, {}), wrong=False, limit=1)
    assert capsys.readouterr().out == "--- a  correct\nQA\n"


def test_a_voter_without_a_valid_vote(tmp_path):
    voter = {"system2_share": None, "held_out_auc": None, "held_out_interval": None, "mass_on_words": None}
    voter |= {"invalid": 3, "failed": {"timeout": 1}, "threshold": 0.5}
    report = {"voters": {"judge": voter}, "agreement": {}, "contested": []}
    (tmp_path / "report.json").write_text(json.dumps(report))
    (text, grid, *_) = run_page._label_counts(
        {"classify:train": Artifact(tmp_path, {"summary": {"examples": 3}})}
    )
    assert text.text == "train: 3 examples." and grid.rows == [["judge", "–%", "3", "1", "0.500", "–", ""]]


def test_groups_are_those_of_their_items(tmp_path, monkeypatch):
    rows = [
        Sample(name, 0, system, "Q", "A", None, "A", "A", right, right, "correct" if right else "wrong")
        for name, system, right in (("a", 1, True), ("b", 2, False), ("c", 2, False))
    ]
    write_jsonl(tmp_path / "samples.jsonl", (asdict(row) for row in rows))
    monkeypatch.setattr(comparison, "current_artifact", lambda store, step: Artifact(tmp_path, {}))
    found = comparison.tables(None, [SimpleNamespace(variant="sft@demo")], "system")["demo"]
    assert {row["group"]: (row["n"], row["accuracy"]) for row in found} == {
        "all": (3, 1 / 3), "system 1": (1, 1), "system 2": (2, 0),
    }  # fmt: skip


SAMPLE = asdict(Sample("a", 0, 1, "Q", "A", None, "A", "A", True, True, "correct", {"tokens": 3}))
LABELLED = {"id": "a", "prompt": "Q", "response": "", "gold": None, "system": None, "votes": {"v": 0.5}}
REPORT = {"voters": {}, "agreement": {}, "contested": []}
METRICS = {"all": {"n": 1, "accuracy": 1.0, "interval": [0.2, 1.0]}}
ROUTER = {"persona": "p", "threshold": 0.5, "auc": None, "examples": 1}


@pytest.mark.parametrize(
    ("name", "good", "odd", "read"),
    [
        ("samples.jsonl", SAMPLE, {"id": ["a"], "correct": "x", "extra": {"tokens": "many"}}, read_samples),
        ("labels.jsonl", LABELLED, {"system": 3, "votes": {"v": "x"}, "prompt": None}, read_labels),
        (
            "report.json", REPORT,
            {"voters": {"v": {}}, "agreement": 1, "contested": [{"prompt": 1}], "known": {"n": -1}},
            lambda file: voters.blocks(file.parent),
        ),
        (
            "metrics.json", METRICS, {"all": {"interval": 0.5}, "system1": {"n": "x"}, "system2": []},
            lambda file: card._results([Artifact(file.parent, {"variant": "sft@demo"})]),
        ),
        (
            "metrics.json", {"routing": {}, "router": ROUTER}, {"routing": {"fast": {}}, "router": {}},
            lambda file: comparison.routings({"eval:auto@demo": Artifact(file.parent, {})}),
        ),
        (
            "history.json", [{"step": 1, "loss": 0.5}], [7, [{"loss": 1}], [{"step": [1]}]],
            lambda file: provenance.tokens(Artifact(file.parent, {})),
        ),
    ],
)  # fmt: skip
def test_a_value_that_no_stage_writes_is_an_error_about_its_file(tmp_path, name, good, odd, read):
    file = tmp_path / name
    file.write_text(json.dumps(good) + "\n")
    read(file)
    for content in odd if isinstance(odd, list) else [{**good, field: odd[field]} for field in odd]:
        file.write_text(json.dumps(content) + "\n")
        with pytest.raises(ArtifactError, match=f"{name}.* is not what its stage writes") as caught:
            read(file)
        assert caught.value.hint == "move its folder away and run the stage again"
