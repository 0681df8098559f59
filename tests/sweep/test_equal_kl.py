"""`benchmarks/equal_kl.py`: the points of an arm, and arms compared at equal KL and equal gain."""

import importlib
import json
from dataclasses import asdict
from types import SimpleNamespace

import pytest
from conftest import ROOT

from stages.lora.training.curves import KL_FROM_START
from stages.records import Sample, write_jsonl


def _samples(marks):
    """Answers to items of each system: r is a right one, w a wrong one."""
    for system, of_system in marks.items():
        for number, mark in enumerate(of_system):
            right, extra = mark == "r", {"intended": system}
            yield asdict(Sample(f"{system}-{number}", 0, None, "", "", "", "", "", right, right, "", extra))


@pytest.fixture
def equal_kl(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("equal_kl")


@pytest.fixture
def artifacts(tmp_path):
    """Artifacts of one cell by step; `part` has the first 4 items of each system, `final` has 6."""
    folders = {"rl": tmp_path}
    for name, marks in {
        "sft@final": {1: "rrrwww", 2: "rwwwrr"},
        "rl-20@part": {1: "rrww", 2: "rrww"},
        "rl@final": {1: "rwwwrr", 2: "rrrrww"},
    }.items():
        folders[f"eval:{name}"] = folder = tmp_path / name
        folder.mkdir()
        write_jsonl(folder / "samples.jsonl", _samples(marks))
    history = [{"step": 20, KL_FROM_START: 0.01}, {"step": 30}, {"step": 40, KL_FROM_START: 0.04}]
    (tmp_path / "history.json").write_text(json.dumps(history))
    return {step: SimpleNamespace(path=path) for step, path in folders.items()}


def test_arms_are_read_on_the_items_of_part_and_compared_where_the_weakest_ends(equal_kl, artifacts):
    reader = SimpleNamespace(current=lambda cell, step: artifacts.get(step))
    cell = SimpleNamespace(config=SimpleNamespace(rl=SimpleNamespace(keep_steps=[20], max_steps=40)))
    points = equal_kl.curve(reader, [cell, cell])
    assert [(p.step, p.kl, p.system1.mean, p.system2.mean) for p in points] == [
        (20, 0.01, -0.25, 0.25),
        (40, 0.04, -0.5, 0.75),
    ]
    # Another arm ends at a KL of .025 and a gain of .5: half way between the points of this one.
    other = [equal_kl.Point(40, 0.025, points[0].system1, SimpleNamespace(mean=0.5))]
    *_, first, second = equal_kl.equal_table({"a": points, "b": other})
    assert (first, second) == ("| a | -37.5 | -37.5 | +50.0 |", "| b | -25.0 | -25.0 | +50.0 |")
    assert equal_kl.missing_steps(reader, cell) == []
    del artifacts["eval:rl-20@part"]
    assert equal_kl.missing_steps(reader, cell) == ["eval:rl-20@part"]


def test_of_a_value_that_is_passed_twice_the_last_counts(equal_kl):
    expected = {0.0: 0.0, 2.0: 0.5, 3.0: 2.0, 3.5: 1.5, 4.1: None, -1.0: None}
    assert {x: equal_kl.interpolated([4.0, 3.0], [1.0, 2.0], x) for x in expected} == expected
