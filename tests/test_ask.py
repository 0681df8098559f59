"""`lorapar ask`: each mode answers as it does in its evaluation, without a server."""

import io
import json

from conftest import ROOT, flags, make_steps

from stages.ask import TrainedModel
from stages.config import ModesSection
from stages.records import read_labels


def test_it_answers_as_the_evaluation_did(finished):
    """Text by text, as far as the shorter limit of the two goes."""
    artifacts = {name: artifact for name, (artifact, _) in make_steps(finished()).items()}
    model = TrainedModel(finished(), artifacts["rl"])
    labels = read_labels(artifacts["classify:demo"].path / "labels.jsonl")
    questions = {row.example.id: row.example.prompt for row in labels}
    lines = (artifacts["eval:rl@demo"].path / "samples.jsonl").read_text("utf-8").splitlines()
    for row in map(json.loads, lines[:3]):
        (answer,) = model.answers(questions[row["id"]])
        shorter = min(len(answer.text), len(row["output"].strip()))
        assert answer.text[:shorter] == row["output"].strip()[:shorter]
        assert answer.tokens == min(row["extra"]["tokens"], model.limit) > 0
        assert answer.complete == (answer.tokens < model.limit)
    modes = ModesSection(fast={"system": "Be quick."}, slow={"system": "Think."})
    asked = TrainedModel(finished().model_copy(update={"modes": modes}), artifacts["rl"]).answers("Why?")
    assert [answer.mode for answer in asked] == ["fast", "slow", "auto"]


def test_a_question_or_one_after_the_other(finished, lorapar, monkeypatch):
    given = [ROOT / "configs/smoke.yaml", *flags(*finished.home)]
    assert lorapar("ask", *given, "How many?").out.count("tokens") == 1
    monkeypatch.setattr("sys.stdin", io.StringIO("How many?\n\nWhy?\n"))
    assert lorapar("ask", *given).out.count("tokens") == 2
