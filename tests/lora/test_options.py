"""Options of one line that others have: each trains, and what it saves is an adapter for plain PEFT."""

import pytest
import torch
from conftest import make_steps
from peft import PeftModel

from stages.models.base import load_adapted, load_base

OPTIONS = {
    "all-linear": ["lora.target_modules=all-linear"],
    "pissa_niter_16": ["lora.init=pissa_niter_16"],
}


@pytest.mark.parametrize("name", OPTIONS)
def test_an_option_trains_and_its_adapter_is_plain_peft(begun, name):
    config = begun(*OPTIONS[name], "sft.max_steps=2", "sft.learning_rate=0.02")
    artifact = make_steps(config, "score", "partition", "sft")["sft"][0]
    summary = artifact.manifest["summary"]
    assert 0 < summary["moved"] <= summary["active"] and summary["frozen_drift"] == 0
    ids = torch.arange(5, 60).view(1, -1)
    plain = PeftModel.from_pretrained(load_base(config.model), str(artifact.path / "adapter"))
    logits = plain(input_ids=ids).logits
    assert torch.equal(logits, load_adapted(config.model, artifact.path / "adapter")(input_ids=ids).logits)
    with plain.disable_adapter():
        assert (logits - plain(input_ids=ids).logits).abs().max() > 1e-3
