"""What `auto` means for types and engines, what vLLM is told of it, and where weights are read to."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from stages.config import ModelSection, ServerSection
from stages.engines import vllm
from stages.models import dtype
from stages.models.base import load_base
from stages.models.size import parameters
from stages.pipeline import resolve


@pytest.fixture(autouse=True)
def asked_anew(monkeypatch):
    monkeypatch.setattr(dtype, "_auto", dtype._auto.__wrapped__)


def changed(tiny: Path, folder: Path, **more: object) -> ModelSection:
    """A model with the tiny one's config and more in it, and no weights."""
    config = json.loads((tiny / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | more))
    return ModelSection(name=str(folder))


def told(model: ModelSection, flag: str, **vllm_settings: object) -> str | None:
    """What vLLM's command says of this."""
    command = vllm._command(model, ServerSection(vllm=vllm_settings), 1, {})
    return command[command.index(flag) + 1] if flag in command else None


@pytest.mark.parametrize(("native", "taken"), [(True, "bfloat16"), (False, "float32")])
def test_auto_is_a_type_that_the_cpu_multiplies(monkeypatch, tiny, tmp_path, native, taken):
    """A GPU, too. float16 is not trained in: no loss is scaled here, and GRPO's gradients are small."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda **_: native)
    assert dtype.resolve(changed(tiny, tmp_path, dtype="float16")) == taken
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(dtype, "native_bfloat16", lambda: native)
    assert dtype.resolve(ModelSection(name=str(tiny))) == "float32"
    assert str(load_base(ModelSection(name=str(tiny), dtype="bfloat16")).dtype) == "torch.bfloat16"
    model = changed(tiny, tmp_path, dtype="bfloat16")
    assert dtype.resolve(model) == taken
    assert told(model, "--dtype") == taken and told(model, "--dtype", dtype="float16") == "float16"


def test_vllm_on_a_gpu_is_told_the_type_unless_the_checkpoint_has_fewer_bits(monkeypatch, tiny, tmp_path):
    """It would take bfloat16 for float32, and votes and answers would be kept under the wrong type."""
    monkeypatch.setattr(vllm, "_have_gpu", lambda: True)
    assert told(ModelSection(name=str(tiny)), "--dtype") == "float32"
    few = changed(tiny, tmp_path, quantization_config={"quant_method": "awq"})
    assert told(few, "--dtype") is None
    assert told(few.model_copy(update={"dtype": "bfloat16"}), "--dtype") == "bfloat16"


def test_vllm_computes_logits_in_float32_where_that_costs_no_copy(monkeypatch, tiny, tmp_path):
    """`hf_overrides` of the config stay, and stretch the context length only where a person has set them."""

    def overrides(name, **vllm_settings):
        return json.loads(told(ModelSection(name=str(name)), "--hf-overrides", **vllm_settings) or "null")

    assert overrides(tiny) is None
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert overrides(tiny) == {"head_dtype": "float32"}
    assert overrides(tiny, hf_overrides={"head_dtype": "model"}) == {"head_dtype": "model"}
    assert overrides(tiny, hf_overrides={"rope_theta": 5}) == {"head_dtype": "float32", "rope_theta": 5}
    changed(tiny, tmp_path, quantization_config={"quant_method": "gptq", "bits": 4})
    assert overrides(tmp_path) is None


def test_journals_tell_answers_of_a_float32_head_from_others(monkeypatch, tiny):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    for engine, weights, precision in (
        ("vllm", "bfloat16", "bfloat16, head float32"),
        ("vllm", "float32", "float32"),
        ("transformers", "bfloat16", "bfloat16"),
    ):
        assert dtype.answer_dtype(ModelSection(name=str(tiny), dtype=weights), engine) == precision


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512, "rope_theta": 1e4}


@pytest.mark.parametrize(("more", "asked"), [({}, "2048"), ({"rope_parameters": YARN}, "4096")])
def test_vllm_is_not_asked_for_more_than_the_model_reads(tiny, tmp_path, monkeypatch, more, asked):
    """It would not start; of a stretched one it knows itself how far."""
    more = {"max_position_embeddings": 2048, **more}
    model = changed(tiny, tmp_path, **more).model_copy(update={"dtype": "float32"})
    assert told(model, "--max-model-len") == asked
    assert told(model, "--max-model-len", hf_overrides={"max_position_embeddings": 8192}) == "4096"
    monkeypatch.setenv("VLLM_ALLOW_LONG_MAX_MODEL_LEN", "1")
    assert told(model, "--max-model-len") == "4096"  # a person who stretches a model is believed


def test_oneDNN_and_the_cpu_are_both_asked(monkeypatch):
    cases = ((1, "avx512_bf16", True), (1, "avx512_f", False), (0, "avx512_bf16", False))
    for onednn, feature, native in cases:
        monkeypatch.setattr("torch.ops.mkldnn._is_mkldnn_bf16_supported", lambda able=onednn: bool(able))
        monkeypatch.setattr("torch.cpu.get_capabilities", lambda feature=feature: {feature: True})
        assert dtype.native_bfloat16() is native


def test_weights_go_to_the_device_without_a_copy_of_all_in_main_memory(monkeypatch, tiny):
    """Several processes would hold one each. The device `meta` stands in for a GPU."""
    read, devices = AutoModelForCausalLM.from_pretrained, []

    def watched(*args, **kwargs):
        model, report = read(*args, **kwargs)
        devices.append({parameter.device.type for parameter in model.parameters()})
        return model, report

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", watched)
    section = ModelSection(name=str(tiny))
    load_base(section, torch.device("meta"))
    load_base(section)
    assert devices == [{"meta"}, {"cpu"}]
    assert not hasattr(load_base(section), "hf_device_map")


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
