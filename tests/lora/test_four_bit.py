"""QLoRA: a base of 4 bits, on CPU by bitsandbytes."""

import importlib.util

import pytest
import torch
from conftest import make_step

from stages.errors import ConfigError
from stages.lora.adapter import adapter
from stages.models.base import load_base

FOUR = ["model.load_in_4bit=true", "model.dtype=bfloat16"]


@pytest.mark.slow
@pytest.mark.parametrize("how", [[], ["lora.init=default", "partition.strategy=all"]])
def test_the_stages_run_and_frozen_elements_stay(begun, how):
    """TRL rounds the adapters of such a base to bfloat16, active and frozen ones alike."""
    pytest.importorskip("bitsandbytes")
    config = begun(*FOUR, *how, "sft.learning_rate=0.01", "sft.num_train_epochs=9")
    for step in ("classify", "score", "partition", "sft", "rl", "eval:rl@demo"):
        made = make_step(config, step)
        if step in ("sft", "rl"):
            summary = made.manifest["summary"]
            assert summary["frozen_drift"] == 0 and summary["moved"] > 0.9 * summary["active"]
            weights = adapter.read(made.path / "adapter").values()
            assert {weight.dtype for weight in weights} == {torch.float32}
    assert made.manifest["summary"]["all"]["n"]


def test_the_base_has_four_bits_and_answers_nearly_like_the_whole_one(begun):
    pytest.importorskip("bitsandbytes")
    four, whole = begun(*FOUR).model, begun("model.dtype=bfloat16").model
    small, large = load_base(four), load_base(whole)
    weight, wide = (model.model.layers[0].mlp.down_proj.weight for model in (small, large))
    assert weight.dtype == torch.uint8 and weight.numel() * 2 == wide.numel()
    ids = torch.arange(5, 40, device=small.device)[None]
    gap = (small(ids).logits - large(ids).logits).float().norm() / large(ids).logits.float().norm()
    assert 0 < gap < 0.3


def test_without_bitsandbytes_it_is_refused(begun, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="model.load_in_4bit: bitsandbytes is not installed") as caught:
        load_base(begun(*FOUR).model)
    assert caught.value.hint == "pip install 'lorapar[qlora]'"
