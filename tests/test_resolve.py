"""Engines that `auto` stands for."""

import json

import pytest

from stages.config import ModelSection
from stages.models.size import parameters
from stages.pipeline import resolve

SIZES = {"hidden_size": 4096, "num_hidden_layers": 32, "vocab_size": 32000, "intermediate_size": 11008}
LARGE = json.dumps({"text_config": SIZES})
"""The config of a model of LLaMA-2-7B's sizes."""


@pytest.mark.parametrize(
    ("voter", "gpu", "vllm", "expected"),
    [
        ("engine: auto", False, True, "transformers"), ("model: LARGE", False, True, "vllm"),
        ("vllm: {quantization: fp8}", False, True, "vllm"), ("engine: vllm", False, True, "vllm"),
        ("model: x, base_url: http://127.0.0.1:1/v1", False, True, "openai"),
        ("engine: auto", True, True, "vllm"), ("engine: auto", "unused", True, "transformers"),
        ("model: LARGE", False, False, "transformers"),
    ],
)  # fmt: skip
def test_large_models_vote_by_vllm_and_on_a_gpu_all(smoke, tmp_path, monkeypatch, voter, gpu, vllm, expected):
    (tmp_path / "config.json").write_text(LARGE)
    monkeypatch.setattr(resolve.importlib.util, "find_spec", lambda name: object() if vllm else None)
    monkeypatch.setattr("stages.runtime.gpu.DEVICE_FILE", tmp_path if gpu else tmp_path / "none")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    voter = f"{{persona: steps, {voter.replace('LARGE', str(tmp_path))}}}"
    device = "cpu" if gpu == "unused" else "auto"
    config = smoke(f"classify.voters=[{voter}]", f"model.device={device}")
    assert resolve.resolved(config).classify.voters[0].engine == expected


def test_parameters_are_told_from_the_config_alone(tmp_path, tiny):
    (tmp_path / "config.json").write_text(LARGE)
    assert parameters(ModelSection(name=str(tmp_path))) == pytest.approx(6.6e9, rel=0.02)
    assert parameters(ModelSection(name=str(tiny))) < 1e6
    (tmp_path / "config.json").write_text("[]")
    assert parameters(ModelSection(name=str(tmp_path))) is None
