"""`lorapar ask`: both modes answer as they do in their evaluation, without a server."""

import io
import json

from conftest import ROOT, flags, make_steps

from stages.ask import TrainedModel
from stages.config import MODES
from stages.records import read_labels


def test_it_answers_as_the_evaluation_did(finished):
    """Text by text, as far as the shorter limit of the two goes."""
    artifacts = {name: artifact for name, (artifact, _) in make_steps(finished()).items()}
    model = TrainedModel(finished(), artifacts)
    labels = read_labels(artifacts["classify:demo"].path / "labels.jsonl")
    questions = {row.example.id: row.example.prompt for row in labels}
    for mode, target in MODES.items():
        lines = (artifacts[f"eval:{target}@demo"].path / "samples.jsonl").read_text("utf-8").splitlines()
        for row in map(json.loads, lines[:3]):
            (answer,) = (a for a in model.answers(questions[row["id"]]) if a.mode == mode)
            shorter = min(len(answer.text), len(row["output"].strip()))
            assert answer.text[:shorter] == row["output"].strip()[:shorter]
            assert answer.tokens == min(row["extra"]["tokens"], model.limit) > 0
            assert answer.complete == (answer.tokens < model.limit)


def test_a_question_or_one_after_the_other(finished, lorapar, monkeypatch):
    given = [ROOT / "configs/smoke.yaml", *flags(*finished.home)]
    assert lorapar("ask", *given, "How many?").out.count("tokens") == 2
    monkeypatch.setattr("sys.stdin", io.StringIO("How many?\n\nWhy?\n"))
    assert lorapar("ask", *given).out.count("tokens") == 4
