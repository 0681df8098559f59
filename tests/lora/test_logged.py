"""What a training logs: its figure, and the ratios to vLLM's probabilities before they are corrected."""

import math

import pytest
import torch

from stages.lora.grpo.metrics import BEYOND, RAW, raw_ratio_metrics
from stages.lora.training import curves
from stages.lora.training.curves import draw  # conftest replaces it before the first test

HISTORY = [
    {"step": step, "loss": 1 / step, "reward": float(step), "rewards/a/mean": 1.0, "rewards/b/mean": 2.0}
    for step in (1, 2, 3)
]


def test_the_figure_has_a_panel_for_all_that_there_is_and_does_not_tell_when_it_was_made(tmp_path):
    drawn = {axes.get_title(): axes for axes in curves.history_figure(HISTORY).axes}
    assert list(drawn) == ["loss", "reward"]
    lines = {line.get_label(): list(line.get_ydata()) for line in drawn["reward"].lines}
    assert lines == {"all, weighted": [1, 2, 3], "a": [1, 1, 1], "b": [2, 2, 2]}
    draw(HISTORY, tmp_path / "one.png")
    draw(HISTORY, tmp_path / "two.png")
    made = (tmp_path / "one.png").read_bytes()
    assert made.startswith(b"\x89PNG") and made == (tmp_path / "two.png").read_bytes()


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
