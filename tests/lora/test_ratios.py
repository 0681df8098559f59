"""Ratios between the trainer's probabilities and vLLM's are logged before the correction."""

import math
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from stages.lora.grpo.ratios import BEYOND, RAW, Ratios

MADE = {
    "completion_mask": torch.tensor([[1, 1, 0], [1, 1, 1]]),
    "old_per_token_logps": torch.tensor([[-1.0, -1.0, 5.0], [-1.0, -2.0, -3.0]]),
    "sampling_per_token_logps": torch.tensor([[-1.0, -3.0, -9.0], [-1.0, float("nan"), -3.0]]),
    "importance_sampling_ratio": torch.tensor([[0.0], [1.0]]),  # the first was masked
}


class Sampler:
    def _generate_and_score_completions(self, inputs):
        return inputs


class Trainer(Ratios, Sampler):
    def __init__(self, mode, training=True):
        self.vllm_importance_sampling_mode, self.vllm_importance_sampling_clip_max = mode, 3.0
        self.model, self.accelerator = SimpleNamespace(training=training), SimpleNamespace(gather=lambda x: x)
        self._metrics = {"train": defaultdict(list)}


@pytest.mark.parametrize(
    ("mode", "ratios"),
    [
        ("sequence_mask", [math.exp(2), 1]),
        ("sequence_truncate", [math.exp(2), 1]),
        ("token_mask", [1, math.exp(2), 1, 1, 1]),
    ],
)
def test_raw_ratios_are_logged(mode, ratios):
    trainer = Trainer(mode)
    assert trainer._generate_and_score_completions(MADE) is MADE
    found = {name: values for name, values in trainer._metrics["train"].items()}
    assert found[f"{RAW}/mean"] == [pytest.approx(sum(ratios) / len(ratios))]
    assert found[f"{RAW}/max"] == [pytest.approx(math.exp(2))]
    assert found[BEYOND] == [pytest.approx(1 / len(ratios))]


@pytest.mark.parametrize(
    ("made", "training"), [({**MADE}, False), ({"completion_mask": MADE["completion_mask"]}, True)]
)
def test_nothing_is_logged_in_an_evaluation_or_without_a_correction(made, training):
    trainer = Trainer("sequence_mask", training)
    trainer._generate_and_score_completions(made)
    assert not trainer._metrics["train"]
