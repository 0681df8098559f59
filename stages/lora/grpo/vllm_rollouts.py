"""Rollouts for GRPO from vLLM in the trainer's process, with weights merged beside the base, not into it."""

import os
from collections.abc import Iterator
from typing import Any

import torch
from huggingface_hub import snapshot_download
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel, set_seed

from stages.config import ModelSection
from stages.config.rl import RlSection, RolloutsSection
from stages.engines.vllm import ON_CPU
from stages.errors import ConfigError
from stages.lora.adapter import merge
from stages.lora.grpo.int8 import CORRECTION_MAX
from stages.models.size import kv_cache_bytes
from stages.runtime import resources

GIB = 2**30
ITEMSIZE = 2
"""Bytes of a number in a colocated vLLM, which also turns a checkpoint of 32 bits into 16."""
ALLOWANCE = 3 * GIB
"""Bytes that a colocated vLLM takes beside weights and cache, by arithmetic: for the 4,096 tokens that it
computes at a time .5 GiB, for its sampler's matrices .6, the rest for CUDA graphs and fragments."""
CACHE_SHARE = 0.5
"""Largest share for keys and values of what the base, vLLM's weights and ALLOWANCE leave free."""
CPU_SHARE = 0.3
"""On a CPU vLLM asks for a share, and takes what ON_CPU says."""


def prepare(rollouts: RolloutsSection) -> None:
    """Prepare the process for vLLM, before anything else of it is imported."""
    if rollouts.engine == "transformers":
        return
    from trl.generation import vllm_generation

    # TRL asks whether the base is in 4 bits, by a module that it has not imported if bitsandbytes was hidden
    # from it (`runtime/libraries.py`). The base never is: a config with 4 bits samples by transformers.
    vllm_generation.is_bitsandbytes_available = lambda: False
    if torch.cuda.is_available():
        return
    # vLLM would bind the threads of its process to cores, and here that is the trainer's process.
    for name, value in {**ON_CPU, "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}.items():
        os.environ.setdefault(name, value)
    from vllm import _custom_ops
    from vllm.model_executor.layers import utils

    # For oneDNN, and small ones for AMX, vLLM repacks its weights once and drops the originals: new weights
    # could not be loaded.
    _custom_ops._supports_onednn = False
    utils.check_cpu_sgl_kernel = lambda *_: False


def arguments(rl: RlSection, base: PreTrainedModel, stops: list[int]) -> dict[str, Any]:
    """The rollout settings of TRL's GRPOConfig. stops: the token ids that end a completion."""
    rollouts = rl.rollouts
    if rollouts.engine == "transformers":
        return {"use_vllm": False, "generation_kwargs": None}
    corrected = rollouts.correction != "none"
    return {
        "use_vllm": True,
        "vllm_mode": rollouts.engine.removeprefix("vllm_"),
        "vllm_model_impl": "vllm",
        "vllm_structured_outputs_regex": None,
        "vllm_gpu_memory_utilization": memory_share(rl, base),
        "vllm_max_model_length": rl.max_prompt_length + rl.max_completion_length,
        "vllm_importance_sampling_correction": corrected,
        "vllm_importance_sampling_mode": rollouts.correction if corrected else "sequence_mask",
        "vllm_importance_sampling_clip_min": None,
        "vllm_importance_sampling_clip_max": CORRECTION_MAX,
        "generation_kwargs": {"stop_token_ids": stops},
    }


def memory_share(rl: RlSection, base: PreTrainedModel) -> float:
    """The share of memory that a colocated vLLM takes beside the trainer's base, if it is not set.

    On a GPU that is its weights, ALLOWANCE, and keys and values of a step's completions; where these do not
    fit, vLLM computes some later. ConfigError if not even those of one completion fit.
    """
    if rl.rollouts.gpu_memory_utilization is not None:
        return rl.rollouts.gpu_memory_utilization
    if not torch.cuda.is_available():
        return CPU_SHARE
    resources.release_memory()
    free, total = torch.cuda.mem_get_info()
    weights = base.num_parameters() * ITEMSIZE
    token = kv_cache_bytes(base.config.get_text_config(), ITEMSIZE)
    completion = (rl.max_prompt_length + rl.max_completion_length) * token
    wanted = rl.prompts_per_step * rl.num_generations * completion
    cache = min(wanted, int(CACHE_SHARE * (free - weights - ALLOWANCE)))
    if cache < completion:
        raise ConfigError(
            f"rl.rollouts.engine vllm_colocate: beside the trainer's base {free / GIB:.1f} GiB of the GPU "
            f"are free, and vLLM needs {weights / GIB:.1f} for weights of its own, {ALLOWANCE / GIB:.0f} to "
            "compute, and room for keys and values",
            "rl.rollouts.engine=transformers",
        )
    return (weights + ALLOWANCE + cache) / total


def name_revision(base: PreTrainedModel, rollouts: RolloutsSection, model: ModelSection) -> None:
    """Let TRL's vLLM load the pinned revision, by a local path: by a name it would load the main one."""
    if rollouts.engine == "vllm_colocate" and model.pinned_revision:
        base.name_or_path = snapshot_download(model.name, revision=model.pinned_revision)


def install_weights(trainer: Any, adapted: PeftModel, seed: int) -> None:
    """Give the trainer's vLLM weights that are merged outside of `adapted`, and seed it."""

    def merged_parameters() -> Iterator[tuple[str, Tensor]]:
        if torch.cuda.is_available():
            # vLLM iterates over the weights, and so merges and packs them, in streams of its own, which do
            # not wait for the trainer's optimizer step.
            torch.cuda.synchronize()
        yield from merge.merged_parameters(adapted)

    # TRL's generator merges into the base and subtracts again: a bfloat16 base drifts a little at each step.
    trainer.vllm_generation._iter_named_params = merged_parameters
    # TRL starts vLLM with the rank for a seed, and vLLM, in this process, seeds all generators with that.
    set_seed(seed + trainer.accelerator.process_index)
