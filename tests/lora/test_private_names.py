"""The private names of others on which lorapar builds are there, with the parameters it gives or takes.

A method that is overridden under a name that has gone is never called, and an attribute that is set under
one is never read: both without a word. Each table is by owner; parameters are by name and in order.
"""

import inspect
import re

import pytest
from accelerate import Accelerator
from peft.tuners.lora.layer import Linear
from torch import nn
from transformers import PreTrainedModel
from trl import GRPOTrainer, SFTTrainer
from trl.generation.vllm_generation import VLLMGeneration
from trl.trainer.utils import RepeatSampler

from stages.lora.adapter.sparse_linear import SparseLinear
from stages.lora.grpo.trainer import GrpoTrainer
from stages.lora.training.sft_trainer import SftTrainer
from stages.lora.training.trainer import ResumableTrainer

TRAINER = {
    "_save_checkpoint": "model trial",
    "_save": "output_dir state_dict",
    "_load_from_checkpoint": "resume_from_checkpoint model",
    "_save_optimizer_and_scheduler": "output_dir",
    "_load_optimizer_and_scheduler": "checkpoint",
    "_save_rng_state": "output_dir",
    "_load_rng_state": "checkpoint",
    "_clip_grad_norm": "model",
}
METHODS = {
    SFTTrainer: TRAINER | {"_prepare_inputs": "inputs"},
    GRPOTrainer: TRAINER
    | {
        "_prepare_inputs": "generation_batch",
        "_get_train_sampler": "dataset",
        "_tokenize_prompts": "prompts",
        "_generate_and_score_completions": "inputs",
        "_get_per_token_logps_and_entropies": (
            "model input_ids attention_mask logits_to_keep batch_size compute_entropy compute_aux_loss "
            "pixel_values image_grid_thw num_images pixel_attention_mask spatial_shapes num_tiles "
            "image_sizes token_type_ids mm_token_type_ids image_position_ids"
        ),
        "_generate_single_turn": "prompt_ids images multimodal_fields num_generations has_tool_images",
        "_compute_loss": "model inputs",
        "_calculate_rewards": "inputs prompts completions completion_ids_list",
    },
    VLLMGeneration: {"_iter_named_params": ""},
    Linear: {"_cast_input_dtype": "x dtype"},
    nn.Linear: {
        "_apply": "fn recurse",
        "_save_to_state_dict": "destination prefix keep_vars",
        "_load_from_state_dict": (
            "state_dict prefix local_metadata strict missing_keys unexpected_keys error_msgs"
        ),
    },
}
ATTRIBUTES = {
    SFTTrainer: ["_total_train_tokens"],
    GRPOTrainer: [
        "_step",
        "_buffered_inputs",
        "_metrics",
        "vllm_generation",
        "_pending_extra_logs",
        "_pending_metrics",
    ],  # fmt: skip
    PreTrainedModel: ["hf_quantizer", "is_quantized", "_no_split_modules"],
}
OWN = {"_non_finite", "_complete", "_logprobs", "_supports_packing"}
"""Private methods that override nothing."""


def source(owner: type) -> str:
    """Of a class and what it inherits from."""
    return "\n".join(inspect.getsource(base) for base in inspect.getmro(owner) if base is not object)


@pytest.mark.parametrize("owner", METHODS, ids=lambda owner: owner.__name__)
def test_methods_take_what_they_took_and_are_called(owner):
    text = source(owner)
    for name, parameters in METHODS[owner].items():
        method = getattr(owner, name, None)
        assert method is not None, f"{owner.__name__}.{name} is gone"
        taken = " ".join(inspect.signature(method).parameters).removeprefix("self").strip()
        assert taken == parameters, f"{owner.__name__}.{name} takes {taken}"
        assert re.search(rf"\.{name}\b", text), f"{owner.__name__}.{name} is called no more"


@pytest.mark.parametrize("owner", ATTRIBUTES, ids=lambda owner: owner.__name__)
def test_attributes_are_set_or_read(owner):
    text = source(owner)
    for name in ATTRIBUTES[owner]:
        assert re.search(rf'self\.{name}\b|getattr\(self, "{name}"', text), f"{owner.__name__}.{name} is gone"


def test_accelerate_asks_whether_a_model_is_prepared_before_it_wraps_it():
    text = inspect.getsource(Accelerator.prepare_model)
    assert text.index("_is_accelerate_prepared") < text.index("DistributedDataParallel")


def test_trl_s_sampler_keeps_what_it_is_given():
    parameters = ["data_source", "mini_repeat_count", "batch_size", "repeat_count", "shuffle", "seed"]
    assert list(inspect.signature(RepeatSampler).parameters) == parameters
    made = RepeatSampler(range(4), 2, 3, 4, True, 5)
    assert [getattr(made, name) for name in parameters] == [range(4), 2, 3, 4, True, 5]
    assert made.num_samples == 4
    assert made.generator.initial_seed() == 5


def test_no_private_override_is_missing_here():
    known = set().union(*METHODS.values()) | OWN
    for owner in (ResumableTrainer, SftTrainer, GrpoTrainer, SparseLinear):
        methods = {name for name, value in vars(owner).items() if inspect.isfunction(value)}
        assert not {name for name in methods - known if re.match("_[a-z]", name)}, owner.__name__


def test_each_method_of_the_library_is_overridden_once():
    for trainer in (SftTrainer, GrpoTrainer):
        assert (
            not set(vars(trainer))
            & set(vars(ResumableTrainer))
            & {*METHODS[SFTTrainer], *METHODS[GRPOTrainer]}
        )


def test_bitsandbytes_repacks_where_it_is_told_not_to():
    modules = pytest.importorskip("bitsandbytes.nn")
    assert "self.support_avx512bf16_for_cpu" in inspect.getsource(modules.Linear4bit)


def test_vllm_asks_whether_there_is_onednn_and_amx():
    pytest.importorskip("vllm")
    from vllm import _custom_ops
    from vllm.model_executor.layers import utils

    assert isinstance(_custom_ops._supports_onednn, bool)
    gemm = inspect.getsource(utils.dispatch_cpu_unquantized_gemm)
    assert "ops._supports_onednn" in gemm and "check_cpu_sgl_kernel(" in gemm


def test_trl_asks_for_four_bits_by_this_name():
    """`vllm_rollouts.prepare` answers it, because bitsandbytes was hidden when TRL's module was imported."""
    assert "is_bitsandbytes_available()" in inspect.getsource(VLLMGeneration._init_vllm)
