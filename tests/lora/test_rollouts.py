"""Rollouts of the trainer, and of a real vLLM in its process, on a CPU."""

import json
import subprocess
import sys
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, flags, make_step
from transformers import Qwen2Config

from stages.config import LoraSection, ModelSection, PromptSection
from stages.config.rl import RlSection, RolloutsSection
from stages.engines import Sampling
from stages.errors import ConfigError, OutOfMemoryError
from stages.lora.adapter import adapter
from stages.lora.adapter.merge import MergedCopy
from stages.lora.grpo import rollouts, vllm_rollouts
from stages.lora.grpo.int8 import linear_layers_in_int8
from stages.models.base import load_base
from stages.models.tokenizer import load_tokenizer
from stages.prompts.renderer import Renderer
from stages.runtime.resources import BatchSize

COLOCATED = RolloutsSection(engine="vllm_colocate")
PROMPTS = [list(range(5, 8 + i)) for i in range(16)]


def sampler_of(tiny, temperature: float, merged: bool) -> rollouts.RolloutSampler:
    """From a merged copy, or through the adapter's layers."""
    section = ModelSection(name=str(tiny), dtype="float32")
    base, tokenizer = load_base(section), load_tokenizer(section)
    copy = MergedCopy(base) if merged else None
    sampling = Sampling(12, (tokenizer.eos_token_id,), temperature)
    size = BatchSize("rl.rollouts.batch_size", 16, "lower rl.max_completion_length")
    model = adapter.initial(base, LoraSection(), 0)
    renderer = Renderer(tokenizer, PromptSection(template="plain"))
    return rollouts.RolloutSampler(model, copy, renderer, sampling, size)


def test_a_limit_of_thoughts_leaves_room_for_an_answer(tokenizer):
    renderer = Renderer(tokenizer, PromptSection())
    with pytest.raises(ConfigError, match="6, with the 11 tokens that close a thought, leaves no room"):
        rollouts.ThoughtLimit(6, 17, renderer)
    assert rollouts.ThoughtLimit(6, 18, renderer)


def test_colocated_samples_differ_by_the_seed(monkeypatch):
    """vLLM in this process has seeded all generators with the rank, whatever the config's seed is."""
    process = SimpleNamespace(process_index=0)
    trainer, drawn = SimpleNamespace(vllm_generation=SimpleNamespace(), accelerator=process), []
    for seed in (3, 3, 7):
        torch.manual_seed(0)
        vllm_rollouts.install_weights(trainer, None, seed)
        drawn.append(float(torch.rand(1)))
    assert drawn[0] == drawn[1] != drawn[2]


def test_without_memory_completions_are_sampled_in_smaller_batches(tiny, monkeypatch, caplog):
    """What had ended is kept, and all are those of a machine with more memory. Nothing drops out of them."""
    sampler = sampler_of(tiny, 1.0, merged=False)
    sampler.adapted.train()
    with_memory, usual, sizes = sampler.sample(PROMPTS, "seed"), rollouts.generate, []

    def full(model, tokenizer, prompts, sampling, stops, seeds, slots, most=4):
        sizes.append((len(prompts), slots))
        assert not any(module.training for module in model.modules())
        for number, completion in enumerate(usual(model, tokenizer, prompts, sampling, stops, seeds, slots)):
            if number == 3 and slots > most:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 12.00 GiB.")
            yield completion

    monkeypatch.setattr(rollouts, "generate", full)
    written = [completion.ids for completion in with_memory]
    assert [completion.ids for completion in sampler.sample(PROMPTS, "seed")] == written
    assert max(map(len, written)) > 1 and len(set(map(tuple, written))) == 16
    assert sizes == [(16, 16), (13, 8), (10, 4)]
    assert "out of memory with rl.rollouts.batch_size 16: going on with 8" in caplog.messages
    monkeypatch.setattr(rollouts, "generate", partial(full, most=0))
    with pytest.raises(OutOfMemoryError, match=r"out of memory with rl\.rollouts\.batch_size 1") as caught:
        sampler.sample(PROMPTS, "seed")
    assert caught.value.hint == "lower rl.max_completion_length"


def test_8_bits_sample_from_nearly_the_same_model(tiny):
    """Their log-probabilities are the sampler's own, and the copy's weights stay as they are."""
    sampler = sampler_of(tiny, 1.3, merged=True)
    model, exact = sampler.copy.model, sampler.sample(PROMPTS, "s")
    weights = {name: value.clone() for name, value in model.named_parameters()}
    completions = replace(sampler, in_int8=True).sample(PROMPTS, "s")
    assert all(torch.equal(value, weights[name]) for name, value in model.named_parameters())

    def logprobs(prompt, ids):
        logits = model(input_ids=torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1] / 1.3
        return logits.log_softmax(-1).gather(1, torch.tensor(ids)[:, None])[:, 0]

    gaps = []
    with torch.no_grad():
        for prompt, completion, float32 in zip(PROMPTS, completions, exact, strict=True):
            told = torch.tensor(completion.logprobs)
            assert torch.allclose(logprobs(prompt, float32.ids), torch.tensor(float32.logprobs), atol=1e-4)
            with linear_layers_in_int8(model, prompt):
                assert torch.allclose(logprobs(prompt, completion.ids), told, atol=2e-3)
            gaps.append((logprobs(prompt, completion.ids) - told).abs().max())
    assert 1e-4 < max(gaps) < 0.1


def test_colocated_vllm_loads_the_revision(monkeypatch, tiny):
    monkeypatch.setattr(vllm_rollouts, "snapshot_download", lambda name, revision: f"/hub/{name}/{revision}")
    revisions = {("a/b", "c1"): "/hub/a/b/c1", ("a/b", "main"): "a/b", (str(tiny), "c1"): "a/b"}
    for (name, revision), called in revisions.items():
        base = SimpleNamespace(name_or_path="a/b")
        vllm_rollouts.name_revision(base, COLOCATED, ModelSection(name=name, revision=revision))
        assert base.name_or_path == called


def test_the_share_is_of_the_card_and_one_that_is_set_stays(monkeypatch):
    """Of Qwen2.5-7B: 256 completions of 384 tokens of 56 KiB are 5.25 GiB, less than half of what is free."""
    layers = {"num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4}
    config = Qwen2Config(**layers, hidden_size=3584)
    base, paper = SimpleNamespace(num_parameters=lambda: 7_615_616_512, config=config), RlSection()
    assert vllm_rollouts.memory_share(RlSection(rollouts={"gpu_memory_utilization": 0.2}), base) == 0.2
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert vllm_rollouts.memory_share(paper, base) == 0.3
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (33 * 2**30, 48 * 2**30))
    assert vllm_rollouts.memory_share(paper, base) == pytest.approx((14.185 + 3 + 5.25) / 48, abs=0.001)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (17 * 2**30, 48 * 2**30))
    with pytest.raises(ConfigError, match=r"17\.0 GiB of the GPU are free, and vLLM needs 14\.2") as caught:
        vllm_rollouts.memory_share(paper, base)
    assert "rl.rollouts.engine=transformers" in caught.value.hint


@pytest.mark.vllm
def test_the_real_engine_answers_like_the_trained_model(begun, capsys):
    """vLLM in the trainer's process: its probabilities after each sync are the trainer's."""
    config = begun("rl.rollouts.engine=vllm_colocate", "rl.max_steps=3")
    make_step(config, "sft")
    settings = [*begun.home, "rl.rollouts.engine=vllm_colocate", "rl.max_steps=3", "rl.learning_rate=0.05"]
    command = [sys.executable, "-m", "lorapar_cli", "rl", "--force", str(ROOT / "configs/smoke.yaml")]
    done = subprocess.run([*command, *flags(*settings)], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    steps = json.loads((config.root / "rl/latest/history.json").read_text())
    differences = [row["sampling/sampling_logp_difference/max"] for row in steps]
    with capsys.disabled():
        print(f"\n  vLLM: log-probabilities differ by {max(differences):.4f} at most", end="")
    assert len(steps) == 3 and max(differences) < 0.05
