"""Where the weights of the base are read to."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from stages.config import ModelSection
from stages.errors import DataError
from stages.models.base import load_adapted, load_base


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


def test_an_adapter_of_no_kind_is_named(tiny, tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"peft_type": ""}')
    with pytest.raises(DataError, match=f"cannot load adapter {tmp_path}: KeyError"):
        load_adapted(ModelSection(name=str(tiny)), tmp_path)
