"""GRPO's objective, in float64 and by hand, against the gradient that the trainer takes."""

from dataclasses import replace

import pytest
import torch
from conftest import make_step, trainer_of
from torch import Tensor

from stages.lora.adapter import adapter, elements
from stages.lora.grpo.int8 import is_supported
from stages.models.base import load_base

BETA = 0.5  # of a size at which the correction stands out from the rounding of float32, on any CPU


def completions_of(base) -> dict[str, Tensor]:
    """Four completions of unequal length, their advantages, and what the base model gives their tokens."""
    prompts, completions = torch.randint(3, 200, (4, 6)), torch.randint(3, 200, (4, 8))
    lengths = torch.tensor([8, 5, 7, 3])
    inputs = {
        "prompt_ids": prompts,
        "prompt_mask": torch.ones_like(prompts),
        "completion_ids": completions,
        "completion_mask": (torch.arange(8) < lengths[:, None]).long(),
        "advantages": torch.tensor([1.2, -0.4, 0.3, -1.1]),
    }
    with torch.no_grad():
        return {**inputs, "ref_per_token_logps": log_probs(base, inputs).float()}


def log_probs(model, inputs: dict[str, Tensor]) -> Tensor:
    """(completions, tokens)"""
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    logits = model(input_ids=ids, attention_mask=mask).logits[:, inputs["prompt_ids"].shape[1] - 1 : -1]
    return logits.log_softmax(-1).gather(2, inputs["completion_ids"][:, :, None]).squeeze(2)


def objective(model, inputs: dict[str, Tensor]) -> Tensor:
    """Equations 3 and 4 of DeepSeekMath (arXiv 2402.03300), first pass over a batch: no ratio is clipped."""
    policy, mask = log_probs(model, inputs), inputs["completion_mask"]
    ratio = torch.exp(policy - policy.detach())
    gap = inputs["ref_per_token_logps"] - policy
    losses = BETA * (gap.exp() - gap - 1) - ratio * inputs["advantages"][:, None]
    return ((losses * mask).sum(1) / mask.sum(1)).mean()


def gradient(model, loss: Tensor) -> Tensor:
    model.zero_grad()
    loss.backward()
    trained = sorted(adapter.trained_parameters(model).items())
    return torch.cat([parameter.grad.flatten().double() for _, parameter in trained])


@pytest.mark.parametrize("way", ["auto", "off"])
def test_the_kl_term_is_grpo_s(begun, monkeypatch, way):
    """TRL's correction changes the gradient and not the loss: where it is on, the oracle must see it."""
    loss = [f"rl.beta={BETA}", "rl.loss_type=grpo", f"rl.prefix_sharing={way}"]
    config = begun("sft.learning_rate=0.1", *loss)
    make_step(config, "sft")
    trainer, model, start = trainer_of(config, monkeypatch)
    assert trainer.prefix_sharing == (way == "auto")
    exact = adapter.attach(load_base(config.model).double(), config.lora, start.folder)
    elements.sparsify(exact, start.active)
    exact.double()
    with exact.disable_adapter():
        inputs = completions_of(exact)
    wanted = objective(exact, inputs)
    oracle = gradient(exact, wanted)
    trainer.current_gradient_accumulation_steps = 1
    apart = {}
    for corrected in (trainer.args.use_bias_correction_kl, True):
        trainer.args.use_bias_correction_kl = corrected
        loss = trainer._compute_loss(model, inputs)
        assert loss.item() == pytest.approx(wanted.item(), abs=1e-6)  # a small difference of terms near 1
        apart[corrected] = float((gradient(model, loss) - oracle).norm() / oracle.norm())
    assert apart.keys() == {False, True}, "the correction is on by default"
    assert apart[False] < 1e-4 and apart[True] > 10 * apart[False]


@pytest.mark.parametrize("way", ["auto", "off"])
def test_what_8_bits_sampled_is_weighted_by_the_policy_s_probability(begun, monkeypatch, way):
    """Truncated importance sampling: min(π / μ, limit), from the pass of the loss itself."""
    limit = 1.5
    monkeypatch.setattr("stages.lora.grpo.trainer.CORRECTION_MAX", limit)
    loss = ["rl.beta=0", "rl.loss_type=grpo", f"rl.prefix_sharing={way}"]
    config = begun("sft.learning_rate=0.1", "rl.rollouts.int8=true", *loss)
    make_step(config, "sft")
    trainer, model, _ = trainer_of(config, monkeypatch)
    assert trainer.sampler.in_int8 == is_supported(trainer.sampler.copy.model)
    trainer.sampler = replace(trainer.sampler, in_int8=True)
    inputs = completions_of(model)
    inputs["advantages"][3] = 0  # skipped where prompts are shared
    mask, policy = inputs["completion_mask"], log_probs(model, inputs)
    inputs["sampling_per_token_logps"] = (policy.detach() + torch.linspace(-1, 1, 32).view(4, 8)) * mask
    weights = (policy.detach() - inputs["sampling_per_token_logps"]).exp().clamp(max=limit)
    losses = -torch.exp(policy - policy.detach()) * weights * inputs["advantages"][:, None]
    oracle = gradient(model, ((losses * mask).sum(1) / mask.sum(1)).mean())
    trainer.current_gradient_accumulation_steps = 1
    loss = trainer._compute_loss(model.train(), inputs)
    assert float((gradient(model, loss) - oracle).norm() / oracle.norm()) < 1e-4
    assert inputs["advantages"].dim() == 1, "the batch itself is unchanged"
    computed = mask.bool() if way == "off" else mask.bool() & (inputs["advantages"] != 0)[:, None]
    largest = (policy.detach() - inputs["sampling_per_token_logps"])[computed].exp().max()
    assert trainer._metrics["train"]["sampling/raw_ratio/max"] == [pytest.approx(float(largest), rel=1e-4)]
