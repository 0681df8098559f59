"""Ratios between the trainer's probabilities and vLLM's are logged before the correction."""

import math

import pytest
import torch

from stages.lora.grpo.metrics import BEYOND, RAW, raw_ratio_metrics

MADE = {
    "completion_mask": torch.tensor([[1, 1, 0], [1, 1, 1]]),
    "old_per_token_logps": torch.tensor([[-1.0, -1.0, 5.0], [-1.0, -2.0, -3.0]]),
    "sampling_per_token_logps": torch.tensor([[-1.0, -3.0, -9.0], [-1.0, float("nan"), -3.0]]),
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
