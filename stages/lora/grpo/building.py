"""Builds the GRPO trainer of a config."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from stages import sandbox as sandboxes
from stages.config import RlSection, SandboxSection
from stages.engines import Sampling
from stages.lora.adapter.merge import MergedCopy
from stages.lora.grpo import int8, vllm_rollouts
from stages.lora.grpo.prompts import RlPrompts
from stages.lora.grpo.rollouts import RolloutSampler, ThoughtLimit
from stages.lora.training import loop
from stages.lora.training.health import LongestBatch
from stages.lora.training.start import Training
from stages.models.base import load_base
from stages.models.load_errors import check_training
from stages.packing.batch import padded
from stages.rewards import calls
from stages.rewards.builtin import rewards
from stages.runtime import libraries
from stages.runtime.resources import BatchSize
from stages.store.checkpoints import Checkpoints

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import Tensor
    from trl import GRPOConfig

    from stages.lora.grpo.trainer import GrpoTrainer
    from stages.prompts.renderer import Renderer
    from stages.sandbox import Sandbox

log = logging.getLogger(__name__)

PINNED: dict[str, Any] = {
    "adam_beta2": 0.99,
    "remove_unused_columns": False,  # rewards read these columns
    "shuffle_dataset": True,
    "disable_dropout": False,
    "cast_lm_head_to_fp32": False,
    "top_p": 1.0,
    "min_p": None,
    "repetition_penalty": 1.0,
    "cache_implementation": None,
    "use_transformers_continuous_batching": False,
    "num_iterations": 1,
    "use_bias_correction_kl": False,
    "importance_sampling_level": "token",
    "epsilon": 0.2,
    "epsilon_high": None,
    "delta": None,
    "scale_rewards": "group",
    "multi_objective_aggregation": "sum_then_normalize",
    "mask_truncated_completions": False,
    "off_policy_mask_threshold": None,
    "top_entropy_quantile": 1.0,
    "entropy_coef": 0.0,
    "use_adaptive_entropy": False,
    "sync_ref_model": False,
}
"""The other arguments of GRPOTrainer on which a result may depend; see `loop.PINNED`."""
SAME_NAME = (
    "per_device_train_batch_size", "num_generations", "max_completion_length",
    "temperature", "top_k", "beta", "loss_type",
)  # fmt: skip
"""Settings that TRL has under the same name."""


@dataclass(frozen=True, kw_only=True)
class Grpo(Training):
    """The sections of RL, and the trainer of them."""

    section: RlSection
    sandbox: SandboxSection | None = None
    """None if no reward runs code."""

    @cached_property
    def functions(self) -> dict[str, Callable[..., Any]]:
        """The rewards by name."""
        return {name: rewards.pick(name, self.section.rewards_file) for name in self.section.rewards}

    @cached_property
    def prompts(self) -> RlPrompts:
        return RlPrompts.from_labels(self.labels, self.renderers, self.section, self.functions, self.seed)

    @cached_property
    def backend(self) -> Sandbox | None:
        """The sandbox of rewards that run code, if there are any."""
        return sandboxes.from_settings(self.sandbox, self.context.progress.say) if self.sandbox else None

    def checked_rewards(self) -> list[Callable[..., Any]]:
        """Those functions with checks of what they return."""
        file = self.section.rewards_file
        return [
            calls.with_checks(name, reward, self.backend if calls.needs_sandbox([name], file) else None)
            for name, reward in self.functions.items()
        ]

    def build(self) -> GrpoTrainer:
        """Load the model with the adapter of `start` and build its trainer; no layer is sparse yet."""
        rl, prompts, stop_ids = self.section, self.prompts, self.renderer.stop_ids
        steps = optimizer_steps(prompts, rl, stage="rl")
        limit = thought_limit(rl, self.renderer)
        model, copy = self._model()
        in_int8 = rl.rollouts.int8 and copy is not None and int8.is_supported(copy.model)
        if rl.rollouts.int8 and not in_int8:
            log.info("rl.rollouts.int8 is for CPUs that compute in float32: no effect here")
        sampling = Sampling(rl.max_completion_length, tuple(stop_ids), rl.temperature, top_k=rl.top_k)
        size = BatchSize("rl.rollouts.batch_size", rl.rollouts.batch_size, "lower rl.max_completion_length")
        sampler = RolloutSampler(model, copy, self.renderer, sampling, size, in_int8)
        rollout_arguments = vllm_rollouts.arguments(rl, model.get_base_model(), stop_ids)
        arguments = _arguments(rl, steps, self.seed, self.context.checkpoints, rollout_arguments)
        grpo_trainer = trainer_class(arguments.use_vllm)
        trainer = grpo_trainer(rl, prompts, sampler, limit, self.checked_rewards(), arguments)
        if rl.rollouts.engine != "transformers":
            vllm_rollouts.install_weights(trainer, model, self.seed)
        from_sft = rl.start_from != "init" and self.baseline is None
        if rl.beta and (rl.kl_reference == "base" or (rl.kl_reference == "auto" and not from_sft)):
            model.delete_adapter("ref")  # TRL then uses the model without its adapter as the reference
        trainer.add_callback(_longest_batch(trainer))
        return trainer

    def _model(self) -> tuple[PeftModel, MergedCopy | None]:
        """The model with the adapter to start from, and the copy that rollouts are sampled from, if any."""
        from transformers import GenerationConfig

        rollouts = self.section.rollouts
        check_training(self.section)
        vllm_rollouts.prepare(rollouts)
        base = load_base(self.model)
        # TRL looks for the stop tokens there, and for all that it is not told; nothing else here reads that
        # file.
        base.generation_config = GenerationConfig(eos_token_id=self.renderer.stop_ids)
        vllm_rollouts.name_revision(base, rollouts, self.model)
        # On a CPU sampling from merged weights is several times as fast as through LoRA layers.
        on_cpu = base.device.type == "cpu" and rollouts.engine == "transformers"
        can_merge = self.baseline is None and not self.model.load_in_4bit
        copy = MergedCopy(base) if on_cpu and can_merge else None
        return self.attach(base), copy


def optimizer_steps(prompts: RlPrompts, rl: RlSection, stage: str = "") -> int:
    """The number of steps of RL on these prompts.

    An epoch is one pass over System 2's prompts; replayed ones of System 1 fill up each step. stage: see
    `loop.steps_of`.
    """
    batches = prompts.system2_rows // (rl.prompts_per_step - rl.replay_prompts)
    return loop.steps_of(batches, rl, stage)


def _arguments(
    rl: RlSection, steps: int, seed: int, checkpoints: Checkpoints, rollouts: dict[str, Any]
) -> GRPOConfig:
    from trl import GRPOConfig

    samples = rl.prompts_per_step * rl.num_generations
    accumulation_steps = loop.accumulation_steps(samples, rl.per_device_train_batch_size)
    return GRPOConfig(
        **loop.arguments(rl, steps, seed, checkpoints),
        **PINNED,
        **{name: getattr(rl, name) for name in SAME_NAME},
        gradient_accumulation_steps=accumulation_steps,
        steps_per_generation=accumulation_steps,
        reward_weights=list(rl.rewards.values()),
        **rollouts,
        log_completions=False,
    )


def thought_limit(rl: RlSection, renderer: Renderer) -> ThoughtLimit | None:
    """The limit of thoughts that is set; ConfigError if it leaves no room for an answer."""
    most = rl.max_thinking_length
    return ThoughtLimit(most, rl.max_completion_length, renderer) if most else None


def trainer_class(uses_vllm: bool) -> type[GrpoTrainer]:
    """GrpoTrainer, for whose import TRL would load vLLM: seconds, for those who sample without it."""
    with libraries.hide_packages(*libraries.UNUSED, *([] if uses_vllm else ["vllm"])):
        from stages.lora.grpo.trainer import GrpoTrainer

    return GrpoTrainer


def _longest_batch(trainer: GrpoTrainer) -> LongestBatch:
    """Dry run on the longest prompts, with completions of `rl.max_completion_length` tokens."""
    rl, prompts = trainer.rl, [list(ids) for ids in trainer.prompts.ids]
    groups = math.ceil(rl.per_device_train_batch_size / rl.num_generations)
    longest = sorted(prompts, key=len)[-groups:]
    rows = [ids for ids in longest for _ in range(rl.num_generations)][: rl.per_device_train_batch_size]
    width = len(longest[-1])

    def loss() -> Tensor:
        # Completions repeat their prompt, because the check in `supports_packing` compares real text.
        texts = [prompt * (1 + math.ceil(rl.max_completion_length / len(prompt))) for prompt in rows]
        sequences = [
            ids[: len(prompt) + rl.max_completion_length] for ids, prompt in zip(texts, rows, strict=True)
        ]
        ids, mask = padded(sequences, 0, trainer.accelerator.device)
        log_probs, *_ = trainer._get_per_token_logps_and_entropies(
            trainer.model_wrapped, ids, mask, rl.max_completion_length, compute_entropy=True
        )
        return log_probs.sum()

    title = f"{len(rows)} completions of {rl.max_completion_length} tokens, prompts of up to {width}"
    return LongestBatch(trainer, loss, title)
