"""`make gpu-check` on a machine without a GPU: what it lets its parts see, and what its benchmarks hold."""

import importlib

import pytest
import torch
from conftest import ROOT

from stages.config import LoraSection, ModelSection
from stages.lora.adapter import adapter
from stages.models.base import load_base


@pytest.fixture
def script(monkeypatch):
    """Imports a script of `benchmarks/`."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module


@pytest.mark.parametrize(
    ("given", "seen"), [(None, "0"), ("2", "2"), ("3,1", "3"), ("GPU-5a,GPU-7b", "GPU-5a")]
)
def test_a_part_of_one_device_gets_the_first_that_was_given(script, monkeypatch, given, seen):
    gpu = script("gpu")
    if given is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
    parts = {part.name.partition(",")[0]: gpu.seen_by(part) for part in gpu.parts(small=True)}
    alone = {"CUDA_VISIBLE_DEVICES": seen}
    assert parts == dict.fromkeys(gpu.NAMES, alone) | {"server": {}, "processes": {}}


def test_both_sides_of_a_benchmark_stand_on_one_base(script, tiny):
    """And neither sees the other's adapter."""
    base = load_base(ModelSection(name=str(tiny)))
    ids = torch.arange(5, 15, device=base.device)[None]
    with torch.no_grad():
        wanted = base(ids).logits
        sides = [script("measure").twin(base) for _ in range(2)]
        model = adapter.initial(sides[0], LoraSection(std=1.0), 0)
        assert not torch.equal(model(ids).logits, wanted)
        assert torch.equal(sides[1](ids).logits, wanted)
    weights = [{weight.data_ptr() for weight in side.parameters()} for side in (base, sides[1])]
    assert weights[0] == weights[1] <= {weight.data_ptr() for weight in model.parameters()}
