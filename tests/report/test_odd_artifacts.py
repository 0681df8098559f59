"""Artifacts that lack what others have are shown all the same, and what no stage writes is named."""

import json
from dataclasses import asdict
from types import SimpleNamespace

from lorapar_cli import terminal
from stages.records import Sample, write_jsonl
from stages.report import comparison, run_page
from stages.store.artifacts import Artifact


def test_a_field_of_the_rows_that_is_called_why(tmp_path, capsys):
    row = Sample("a", 0, None, "Q", "A", None, "A", "A", True, True, "correct", {"why": "it is so"})
    write_jsonl(tmp_path / "samples.jsonl", [asdict(row)])
    terminal.samples(Artifact(tmp_path, {}), wrong=False, limit=1)
    assert capsys.readouterr().out == "--- a  correct\nQA\n"


def test_a_voter_without_a_valid_vote(tmp_path):
    voter = {"system2_share": None, "held_out_auc": None, "held_out_interval": None}
    known = {"field": "kind", "agreement": None, "n": 0}
    (tmp_path / "report.json").write_text(json.dumps({"voters": {"judge": voter}, "known": known}))
    text, grid = run_page._labels({"classify:train": Artifact(tmp_path, {"summary": {"examples": 3}})})
    assert text.text == "train: 3 examples." and grid.rows == [["judge", "–", "–"]]


def test_groups_are_those_of_their_items(tmp_path, monkeypatch):
    rows = [
        Sample(name, 0, system, "Q", "A", None, "A", "A", right, right, "correct" if right else "wrong")
        for name, system, right in (("a", 1, True), ("b", 2, False), ("c", 2, False))
    ]
    write_jsonl(tmp_path / "samples.jsonl", (asdict(row) for row in rows))
    monkeypatch.setattr(comparison, "current_artifact", lambda store, step: Artifact(tmp_path, {}))
    found = comparison.measured(None, [SimpleNamespace(variant="sft@demo")], "system")["demo"]
    assert {each.group: (each.n, each.accuracy.mean) for each in found} == {
        "all": (3, 1 / 3), "system 1": (1, 1), "system 2": (2, 0),
    }  # fmt: skip
