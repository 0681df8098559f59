"""The private names of others on which lorapar builds are there.

A method that is overridden under a name that has gone is never called, and an attribute that is set under
one is never read: both without a word.
"""

import inspect
import re

import pytest
from accelerate import Accelerator
from peft.tuners.lora.layer import Linear
from transformers import PreTrainedModel
from trl import GRPOTrainer, SFTTrainer
from trl.generation.vllm_generation import VLLMGeneration

from stages.lora.adapter.elements import SparseLinear
from stages.lora.grpo.trainer import GrpoTrainer
from stages.lora.training.trainer import ResumableTrainer
from stages.sft.run import SftTrainer

OWN = {"_non_finite", "_complete", "_logprobs", "_supports_packing", "_random_file"}
"""Private methods that override nothing."""
REPLACED = {VLLMGeneration: ["_iter_named_params"], Linear: ["_cast_input_dtype"]}
"""Methods that are set on objects."""
ATTRIBUTES = {
    SFTTrainer: ["_total_train_tokens"],
    GRPOTrainer: [
        "_step", "_buffered_inputs", "_metrics", "vllm_generation", "_pending_extra_logs", "_pending_metrics",
    ],
    PreTrainedModel: ["hf_quantizer", "is_quantized", "_no_split_modules"],
}  # fmt: skip


def source(*owners: type) -> str:
    return "\n".join(inspect.getsource(owner) for owner in owners if owner is not object)


@pytest.mark.parametrize("ours", [SftTrainer, GrpoTrainer, SparseLinear], ids=lambda ours: ours.__name__)
def test_private_methods_override_some_that_are_called(ours):
    bases = [base for base in inspect.getmro(ours) if not base.__module__.startswith("stages.")]
    text = source(*bases)
    for owner in (ours, ResumableTrainer) if issubclass(ours, ResumableTrainer) else (ours,):
        for name, value in vars(owner).items():
            if inspect.isfunction(value) and re.match("_[a-z]", name) and name not in OWN:
                assert any(name in vars(base) for base in bases), f"{name} overrides nothing"
                assert re.search(rf"\.{name}\b", text), f"{name} is called no more"


def test_methods_that_are_set_on_objects_are_called():
    for owner, names in REPLACED.items():
        assert all(f"self.{name}(" in source(*inspect.getmro(owner)) for name in names), owner


@pytest.mark.parametrize("owner", ATTRIBUTES, ids=lambda owner: owner.__name__)
def test_attributes_are_set_or_read(owner):
    text = source(*inspect.getmro(owner))
    for name in ATTRIBUTES[owner]:
        assert re.search(rf'self\.{name}\b|getattr\(self, "{name}"', text), f"{owner.__name__}.{name} is gone"


def test_accelerate_asks_whether_a_model_is_prepared_before_it_wraps_it():
    text = inspect.getsource(Accelerator.prepare_model)
    assert text.index("_is_accelerate_prepared") < text.index("DistributedDataParallel")
