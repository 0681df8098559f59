"""Prompt tuning and its kin: the same stages without scores and masks."""

import pytest
import torch
from conftest import ROOT, flags, make_step
from safetensors.torch import load_file

from stages.engines import Sampling
from stages.engines.continuous_batching import generate
from stages.engines.in_process import InProcess
from stages.lora.adapter import adapter, baselines
from stages.models.base import load_adapted, load_base
from stages.models.tokenizer import load_tokenizer
from stages.pipeline.resolve import resolved
from stages.pipeline.steps import plan_steps

METHODS = ["ia3", "prompt_tuning", "p_tuning", "prefix_tuning"]
SLOW = [pytest.param(method, marks=pytest.mark.slow) for method in METHODS[1:]]
COMMON = ["eval.targets=[base,sft,rl]", "sft.num_train_epochs=9"]


def chosen(begun, method: str, *more: str):
    return begun(f"baseline.method={method}", *COMMON, *more)


@pytest.mark.parametrize("method", ["ia3", *SLOW])
def test_sft_rl_and_eval_run(begun, method):
    """In 16 bits every second of them."""
    dtype = ("float32", "bfloat16")[METHODS.index(method) % 2]
    config = chosen(begun, method, f"model.dtype={dtype}")
    assert not {"score", "partition"} & set(plan_steps(resolved(config)))
    _, *made = [make_step(config, step) for step in ("classify", "sft", "rl", "eval:rl@demo")]
    for stage in made[:2]:
        summary = stage.manifest["summary"]
        assert summary["active_share"] == 1 and summary["moved"] > 0.9 * summary["elements"] > 0
    first, second = (load_file(artifact.path / "adapter" / baselines.STATE) for artifact in made[:2])
    assert first.keys() == second.keys() and any(not torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("method", METHODS)
def test_what_is_saved_answers_like_what_was_trained(begun, method, tmp_path):
    """PEFT's own file on the plain base, against the parameters from which RL goes on."""
    config = chosen(begun, method)
    ids = torch.arange(5, 25)[None]
    made = baselines.attach(load_base(config.model), config.baseline, config.seed, None)
    for weight in adapter.trained_parameters(made).values():
        weight.data += 0.1 * torch.randn(weight.shape)
    adapter.save(made, tmp_path, config.model)
    baselines.save(made, tmp_path)
    base = load_base(config.model)
    trained = baselines.attach(base, config.baseline, config.seed, tmp_path).eval()
    plain = load_adapted(config.model, tmp_path)
    wanted = trained(ids).logits[:, -20:]
    assert torch.allclose(plain(ids).logits[:, -20:], wanted, atol=1e-6)
    assert float((load_base(config.model)(ids).logits - wanted).abs().max()) > 1e-3


def test_texts_after_a_trained_prompt_are_never_padded(begun):
    """Padding or a shared cache would part the two."""
    config = chosen(begun, "prefix_tuning")
    model = load_adapted(config.model, make_step(config, "sft").path / "adapter")
    prompts = [list(range(5, 60)), list(range(5, 50)), list(range(90, 95))]
    tokenizer = load_tokenizer(config.model)
    sampling = Sampling(4, (tokenizer.eos_token_id,))
    made = dict(generate(model, tokenizer, prompts, sampling))
    assert all(len(made[i].ids) == 4 for i in range(3))
    for i, ids in enumerate(prompts):
        assert dict(generate(model, tokenizer, [ids], sampling)) == {0: made[i]}
    with torch.no_grad():
        together = InProcess(model, tokenizer, 8)._last_logits(prompts)
        alone = torch.cat([model(torch.tensor([ids])).logits[:, -1] for ids in prompts])
    assert torch.allclose(together, alone, atol=1e-5)


def test_a_trained_prompt_cannot_be_merged(begun, lorapar, tmp_path):
    config = chosen(begun, "p_tuning")
    make_step(config, "sft")
    settings = flags(*begun.home, "baseline.method=p_tuning", *COMMON)
    export = ("export", ROOT / "configs/smoke.yaml", tmp_path / "out", "--target", "sft")
    done = lorapar(*export, *settings, "--merged")
    assert done.code == 78 and "p_tuning trains a prompt, which no weight can hold" in done.err
    done = lorapar(*export, *settings)
    assert done.code == 0, done.err
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names >= {"README.md", adapter.ADAPTER, "adapter_config.json"}
    assert "after p_tuning\n" in (tmp_path / "out/README.md").read_text()
