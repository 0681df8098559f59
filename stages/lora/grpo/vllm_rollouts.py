"""Rollouts for GRPO from vLLM in the trainer's process, with weights merged beside the base, not into it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import torch
from huggingface_hub import snapshot_download
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel, set_seed

from stages.config import BaselineSection, ModelSection
from stages.config.rl import RlSection, RolloutsSection
from stages.engines.vllm import ON_CPU
from stages.errors import ConfigError
from stages.lora.adapter import merge
from stages.lora.grpo.int8 import CORRECTION_MAX
from stages.models.size import kv_cache_bytes
from stages.runtime import ranks, resources

GIB = 2**30
ITEMSIZE = 2
"""Bytes of a number in a colocated vLLM, which also turns a checkpoint of 32 bits into 16."""
ALLOWANCE = 3 * GIB
"""Bytes that a colocated vLLM takes beside weights and cache, by arithmetic.

TRL lets it compute 4,096 tokens at a time, for which an MLP of Qwen2.5-7B's width needs .5 GiB. Its sampler
holds about four float32 matrices of 256 completions × vocabulary, .6 GiB. The rest is for CUDA graphs,
libraries and fragments.
"""
CACHE_SHARE = 0.5
"""Largest share for keys and values of what the base, vLLM's weights and ALLOWANCE leave free."""
CPU_SHARE = 0.3
"""On a CPU vLLM asks for a share, and takes what ON_CPU says."""


def prepare(rollouts: RolloutsSection) -> None:
    """To be called first, if vLLM is installed."""
    if rollouts.engine == "transformers":
        return
    from trl.generation import vllm_generation

    # TRL asks whether the base is in 4 bits, by a module that it has not imported if bitsandbytes was hidden
    # from it (`runtime/libraries.py`). The base never is: a config with 4 bits samples by transformers.
    vllm_generation.is_bitsandbytes_available = lambda: False
    if not torch.cuda.is_available():
        _on_cpu()


def _on_cpu() -> None:
    # vLLM would bind the threads of its process to cores, and here that is the trainer's process.
    for name, value in {**ON_CPU, "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}.items():
        os.environ.setdefault(name, value)
    from vllm import _custom_ops
    from vllm.model_executor.layers import utils

    # For oneDNN, and small ones for AMX, vLLM repacks its weights once and drops the originals: new weights
    # could not be loaded.
    _custom_ops._supports_onednn = False
    utils.check_cpu_sgl_kernel = lambda *_: False


def arguments(rollouts: RolloutsSection, longest: int, stops: list[int]) -> dict[str, Any]:
    """The rollout settings of TRL's GRPOConfig.

    longest: tokens of prompt and completion together. stops: the token ids that end a completion.
    """
    if rollouts.engine == "transformers":
        return {"use_vllm": False, "generation_kwargs": None}
    corrected = rollouts.correction != "none"
    return {
        "use_vllm": True,
        "vllm_mode": rollouts.engine.removeprefix("vllm_"),
        "vllm_model_impl": "vllm",
        "vllm_structured_outputs_regex": None,
        "vllm_gpu_memory_utilization": rollouts.gpu_memory_utilization,
        "vllm_max_model_length": longest,
        "vllm_importance_sampling_correction": corrected,
        "vllm_importance_sampling_mode": rollouts.correction if corrected else "sequence_mask",
        "vllm_importance_sampling_clip_min": None,
        "vllm_importance_sampling_clip_max": CORRECTION_MAX,
        "generation_kwargs": {"stop_token_ids": stops},
    }


def with_memory_share(rl: RlSection, base: PreTrainedModel) -> RlSection:
    """`rl` with the share of memory that a colocated vLLM takes, if it is not set.

    base: the trainer's, as it is on this process's GPU. ConfigError if vLLM does not fit beside it.
    """
    rollouts = rl.rollouts
    if rollouts.engine != "vllm_colocate" or rollouts.gpu_memory_utilization is not None:
        return rl
    share = CPU_SHARE
    if torch.cuda.is_available():
        resources.release_memory()
        free, total = torch.cuda.mem_get_info()
        token = kv_cache_bytes(base.config.get_text_config(), ITEMSIZE)
        share = colocated_bytes(rl, base.num_parameters(), token, free) / total
    return rl.model_copy(update={"rollouts": rollouts.model_copy(update={"gpu_memory_utilization": share})})


def colocated_bytes(rl: RlSection, parameters: int, token: int, free: int) -> int:
    """Bytes of a GPU for a colocated vLLM: its weights, ALLOWANCE, keys and values of a step's completions.

    weights + ALLOWANCE + min(completions · tokens · token, share · (free - weights - ALLOWANCE))

    Where not all keys and values fit, vLLM computes some completions later. parameters: of the base. token:
    bytes of a token's keys and values. free: bytes beside the trainer's base.
    ConfigError if not even the keys and values of one completion fit.
    """
    weights = parameters * ITEMSIZE
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
    return weights + ALLOWANCE + cache


def copy_of(
    base: PreTrainedModel, rollouts: RolloutsSection, model: ModelSection, baseline: BaselineSection | None
) -> merge.MergedCopy | None:
    """On CPU, if the trainer samples itself, a copy of the base to merge LoRA into; else None.

    Sampling from merged weights is several times faster there than through LoRA layers.
    """
    samples_on_cpu = base.device.type == "cpu" and rollouts.engine == "transformers"
    mergeable = baseline is None and not model.load_in_4bit
    return merge.MergedCopy(base) if samples_on_cpu and mergeable else None


def name_revision(base: PreTrainedModel, rollouts: RolloutsSection, model: ModelSection) -> None:
    """Let TRL's vLLM load the pinned revision, by a local path: by a name it would load the main one."""
    if rollouts.engine == "vllm_colocate" and model.pinned_revision:
        base.name_or_path = snapshot_download(model.name, revision=model.pinned_revision)


def install_weights(trainer: Any, adapted: PeftModel, rollouts: RolloutsSection, seed: int) -> None:
    """Give the trainer's vLLM weights that are merged outside of `adapted`; seed a colocated one."""

    def merged_parameters() -> Iterator[tuple[str, Tensor]]:
        if torch.cuda.is_available():
            # vLLM iterates over the weights, and so merges and packs them, in streams of its own, which do
            # not wait for the trainer's optimizer step.
            torch.cuda.synchronize()
        yield from merge.merged_parameters(adapted)

    # TRL's generator merges into the base and subtracts again: a bfloat16 base drifts a little at each step.
    trainer.vllm_generation._iter_named_params = merged_parameters
    if rollouts.engine == "vllm_colocate":
        # TRL starts vLLM with the rank for a seed, and vLLM, in this process, seeds all generators with that.
        set_seed(seed + ranks.rank())
