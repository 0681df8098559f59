"""Engines that `auto` stands for."""

import json

import pytest

from stages.config import ModelSection
from stages.models.size import parameters
from stages.pipeline import resolve

SIZES = {"hidden_size": 4096, "num_hidden_layers": 32, "vocab_size": 32000, "intermediate_size": 11008}
LARGE = json.dumps({"text_config": SIZES})
"""The config of a model of LLaMA-2-7B's sizes."""


@pytest.fixture
def engine(smoke, tmp_path, monkeypatch):
    """Returns the engine of a voter with these settings, on a machine with vLLM, with or without a GPU."""
    (tmp_path / "large").mkdir()
    (tmp_path / "large/config.json").write_text(LARGE)

    def of(voter: str, gpu: bool = False, vllm: bool = True, device: str = "auto") -> str:
        monkeypatch.setattr(resolve.importlib.util, "find_spec", lambda name: object() if vllm else None)
        monkeypatch.setattr("stages.runtime.gpu.DEVICE_FILE", tmp_path if gpu else tmp_path / "none")
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        voter = voter.replace("LARGE", str(tmp_path / "large"))
        config = smoke(f"classify.voters=[{{persona: steps, {voter}}}]", f"model.device={device}")
        return resolve.resolved(config).classify.voters[0].engine

    return of


@pytest.mark.parametrize(
    ("voter", "expected"),
    [
        ("engine: auto", "transformers"),
        ("model: LARGE", "vllm"),
        ("vllm: {quantization: fp8}", "vllm"),
        ("model: x, base_url: http://127.0.0.1:1/v1", "openai"),
        ("engine: vllm", "vllm"),
    ],
)
def test_on_a_cpu_small_models_vote_in_process(engine, voter, expected):
    assert engine(voter) == expected


def test_on_a_gpu_all_are_served_and_without_vllm_none(engine):
    assert engine("engine: auto", gpu=True) == "vllm"
    assert engine("model: LARGE", vllm=False) == "transformers"
    assert engine("engine: auto", gpu=True, device="cpu") == "transformers"


def test_parameters_are_told_from_the_config_alone(tmp_path, tiny):
    (tmp_path / "config.json").write_text(LARGE)
    assert parameters(ModelSection(name=str(tmp_path))) == pytest.approx(6.6e9, rel=0.02)
    assert parameters(ModelSection(name=str(tiny))) < 1e6
    (tmp_path / "config.json").write_text("[]")
    assert parameters(ModelSection(name=str(tmp_path))) is None
