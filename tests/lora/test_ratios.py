"""Ratios between the trainer's probabilities and vLLM's are logged before the correction."""

import math
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from trl import GRPOTrainer

from stages.lora.grpo.ratios import BEYOND, RAW, raw_ratio_metrics
from stages.lora.grpo.trainer import GrpoTrainer

MADE = {
    "completion_mask": torch.tensor([[1, 1, 0], [1, 1, 1]]),
    "old_per_token_logps": torch.tensor([[-1.0, -1.0, 5.0], [-1.0, -2.0, -3.0]]),
    "sampling_per_token_logps": torch.tensor([[-1.0, -3.0, -9.0], [-1.0, float("nan"), -3.0]]),
    "importance_sampling_ratio": torch.tensor([[0.0], [1.0]]),  # the first was masked
}


@pytest.mark.parametrize(
    ("of_tokens", "ratios"),
    [(False, [math.exp(2), 1]), (True, [1, math.exp(2), 1, 1, 1])],
)
def test_raw_ratios_are_logged(of_tokens, ratios):
    logged = dict(raw_ratio_metrics(MADE, of_tokens, 3.0, lambda value: value))
    assert logged[f"{RAW}/mean"] == pytest.approx(sum(ratios) / len(ratios))
    assert logged[f"{RAW}/max"] == pytest.approx(math.exp(2))
    assert logged[BEYOND] == pytest.approx(1 / len(ratios))


@pytest.mark.parametrize("training", [True, False])
def test_a_step_of_training_with_a_correction_logs_them(monkeypatch, training):
    monkeypatch.setattr(GRPOTrainer, "_generate_and_score_completions", lambda self, inputs: MADE)
    trainer = object.__new__(GrpoTrainer)
    trainer.args, trainer.model = SimpleNamespace(use_vllm=True), SimpleNamespace(training=training)
    trainer.accelerator = SimpleNamespace(gather=lambda value: value)
    trainer.attempts, trainer._equal = 0, torch.tensor([True, False])
    trainer.vllm_importance_sampling_mode, trainer.vllm_importance_sampling_clip_max = "token_mask", 3.0
    trainer._metrics = {"train": defaultdict(list, frac_reward_zero_std=[0.0])}
    assert trainer._generate_and_score_completions([]) is MADE
    logged = trainer._metrics["train"]
    assert logged["frac_reward_zero_std"] == ([0.5] if training else [0.0])
    assert logged[f"{RAW}/mean"] == ([pytest.approx((math.exp(2) + 4) / 5)] if training else [])
