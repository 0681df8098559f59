"""rl: GRPO on the active System 2 elements, by TRL's GRPOTrainer, from the SFT adapter."""

from __future__ import annotations

from collections.abc import Callable
from statistics import fmean
from typing import TYPE_CHECKING, Any

from stages import sandbox as sandboxes
from stages.config import BaselineSection, LoraSection, ModelSection, PromptSection, RlSection, SandboxSection
from stages.engines import Sampling
from stages.lora.adapter import fsdp
from stages.lora.adapter.fsdp import DividedRollouts
from stages.lora.grpo import vllm_rollouts
from stages.lora.grpo.dynamic_sampling import Resampling
from stages.lora.grpo.kl_probe import NAME as DRIFT
from stages.lora.grpo.kl_probe import KlProbe
from stages.lora.grpo.prompts import RlPrompts
from stages.lora.grpo.ratios import Ratios
from stages.lora.grpo.replay import Replay
from stages.lora.grpo.sampler import RolloutSampler, Written
from stages.lora.grpo.zero_advantage import Silent
from stages.lora.training import dry_run, loop
from stages.lora.training.health import Healthy, ProgressCallback, RunInfo, row_ids
from stages.lora.training.optimizers import LoraPlus, WarmUp
from stages.lora.training.resume import ExactRollouts
from stages.models.base import load_base
from stages.models.tokenizer import load_tokenizer
from stages.packing import trl
from stages.packing.support import is_prompt_learning
from stages.packing.trl import SharedPrompts
from stages.prompts.renderer import Renderer
from stages.records import read_labels
from stages.rewards import loading
from stages.runtime import libraries
from stages.store.checkpoints import Checkpoints

if TYPE_CHECKING:
    from trl import GRPOConfig

    from stages.pipeline.context import StageContext
    from stages.sandbox import Sandbox

PINNED: dict[str, Any] = {
    "remove_unused_columns": False,  # rewards read these columns
    "shuffle_dataset": True,
    "disable_dropout": False,
    "cast_lm_head_to_fp32": False,
    "min_p": None,
    "repetition_penalty": 1.0,
    "cache_implementation": None,
    "use_transformers_continuous_batching": False,
    "delta": None,
    "multi_objective_aggregation": "sum_then_normalize",
    "mask_truncated_completions": False,
    "off_policy_mask_threshold": None,
    "top_entropy_quantile": 1.0,
    "entropy_coef": 0.0,
    "use_adaptive_entropy": False,
    "sync_ref_model": False,
}
"""The other arguments of GRPOTrainer on which a result may depend; see `training.PINNED`."""

LENGTH = "completions/mean_length"
SHOWN = ("reward", "frac_reward_zero_std", LENGTH)
"""What is logged of a step that its line shows."""


def run(
    job: StageContext,
    model: ModelSection,
    prompt: PromptSection,
    lora: LoraSection,
    baseline: BaselineSection | None,
    rl: RlSection,
    seed: int,
    sandbox: SandboxSection | None = None,
) -> dict[str, Any]:
    """Write `adapter/` and `history.json`; returns what was trained and what rewards it earned."""
    from transformers import GenerationConfig

    labels = read_labels(job.labels)
    renderer = Renderer(load_tokenizer(model), rl.prompt or prompt, labels)
    functions = {name: loading.load(name, rl.rewards_file) for name in rl.rewards}
    pool = RlPrompts.of(labels, renderer, rl, functions, seed)
    start = loop.InitialAdapter.of("rl", job.adapter("sft", "score"), job.masks)
    steps = loop.steps_of(pool.slow // (rl.prompts_per_step - rl.replayed), rl, rl.num_iterations)
    vllm_rollouts.prepare(rl.rollouts, model.name)
    base = load_base(model, fsdp.load_device(rl.launch))
    # TRL looks for the stop tokens there, and for all that it is not told; nothing else here reads that file.
    base.generation_config = GenerationConfig(eos_token_id=renderer.stop_ids)
    vllm_rollouts.name_revision(base, rl.rollouts, model)
    copy = None if fsdp.is_sharded(rl.launch) else vllm_rollouts.copy_of(base, rl.rollouts, model, baseline)
    peft_model = start.attach(base, lora, baseline, rl.lora_dropout, seed)
    fsdp.shard_base(peft_model, rl.launch)
    arguments = _arguments(rl, steps, seed, job.checkpoints, renderer.stop_ids)
    box = sandboxes.of(sandbox, job.progress.say) if sandbox else None
    rewards = _checked(functions, rl, box, pool.encoded)
    sampling = Sampling(
        rl.max_completion_length, tuple(renderer.stop_ids), rl.temperature, rl.top_p, rl.top_k
    )
    writer = RolloutSampler(peft_model, copy, renderer.tokenizer, sampling)
    trainer = _trainer(renderer, pool, rl, rewards, arguments, writer)
    if rl.rollouts.engine != "transformers":
        vllm_rollouts.from_base(trainer, peft_model, rl.rollouts, seed)
    trainer.sharing = rl.prefix_sharing == "auto" and trl.may_share(peft_model)
    trl.accept_packed(base)
    if rl.beta and _holds_to_base(rl, baseline):
        peft_model.delete_adapter("ref")  # TRL then uses the model without its adapter as the reference
    knobs = (
        f"rl.per_device_train_batch_size from {rl.per_device_train_batch_size}, "
        f"or rl.max_completion_length from {rl.max_completion_length}"
    )
    trainer.vitals = RunInfo(row_ids(lambda: pool.ids, "prompt_ids", "prompt_mask"), knobs)
    trainer.add_callback(dry_run.longest_of_rl(trainer, [list(ids) for ids in pool.ids], rl))
    trainer.add_callback(
        ProgressCallback(job.progress, f"rl on {pool.slow} prompts", steps, SHOWN, rl.max_zero_signal_steps)
    )
    if pool.held_out and not is_prompt_learning(peft_model):
        if start.active is not None:
            start.restore(peft_model)
        trainer.add_callback(KlProbe(trainer, pool.held_out, writer, rl))
    summary = loop.train(trainer, peft_model, start, job.out, model, job.checkpoints)
    return {
        "prompts": pool.slow,
        "replayed_prompts": pool.replayed,
        "cut_prompts" if rl.too_long == "truncate_left" else "dropped_prompts": pool.long,
        "prompt": renderer.digest(),
        **({"sandbox": box.name} if box else {}),
        **_earned(loop.history(trainer), rl.prompts_per_step * rl.num_generations),
        **summary,
    }


def _holds_to_base(rl: RlSection, baseline: BaselineSection | None) -> bool:
    """Whether the KL term's reference is the base model, and not the adapter that RL starts from."""
    if rl.kl_reference == "auto":
        return rl.start_from != "sft" or baseline is not None
    return rl.kl_reference == "base"


def _earned(history: list[dict[str, Any]], per_step: int) -> dict[str, Any]:
    """What the steps earned and cost; quarters are those of the steps in which completions were sampled.

    A reward is None where no reward applied to any completion.
    """
    sampled = [row for row in history if LENGTH in row]
    quarter = max(1, len(sampled) // 4)
    quarters = sampled[:quarter], sampled[-quarter:]
    first, last = ([row["reward"] for row in part if "reward" in row] for part in quarters)
    drift = [row[DRIFT] for row in history if DRIFT in row]
    return {
        "equal_reward_steps": sum(row.get("frac_reward_zero_std") == 1 for row in history),
        "reward_first_quarter": fmean(first) if first else None,
        "reward_last_quarter": fmean(last) if last else None,
        "length_last_quarter": fmean(row[LENGTH] for row in sampled[-quarter:]),
        "completions": int(sum(per_step + row.get("resampled/completions", 0) for row in sampled)),
        **({"kl_from_start": drift[-1]} if drift else {}),
    }


def _checked(
    functions: dict[str, Callable[..., Any]],
    rl: RlSection,
    box: Sandbox | None,
    decoded: frozenset[str],
) -> list[Callable[..., Any]]:
    """The rewards as GRPOTrainer calls them. Those that run code are given the sandbox."""

    def fixed(name: str) -> dict[str, Sandbox | None]:
        return {"sandbox": box} if loading.needs_sandbox(name, rl.rewards_file) else {}

    return [loading.checked(name, function, decoded, **fixed(name)) for name, function in functions.items()]


def _arguments(
    rl: RlSection, steps: int, seed: int, checkpoints: Checkpoints, stops: list[int]
) -> GRPOConfig:
    from trl import GRPOConfig

    accumulation = loop.accumulation(rl.prompts_per_step * rl.num_generations, rl.per_device_train_batch_size)
    return GRPOConfig(
        **loop.arguments(rl, steps, seed, checkpoints, rl.num_iterations),
        **PINNED,
        per_device_train_batch_size=rl.per_device_train_batch_size,
        gradient_accumulation_steps=accumulation,
        steps_per_generation=accumulation,
        num_generations=rl.num_generations,
        num_iterations=rl.num_iterations,
        max_completion_length=rl.max_completion_length,
        temperature=rl.temperature,
        top_p=rl.top_p,
        top_k=rl.top_k,
        beta=rl.beta,
        use_bias_correction_kl=rl.use_bias_correction_kl,
        loss_type=rl.loss_type,
        importance_sampling_level=rl.importance_sampling_level,
        epsilon=rl.epsilon,
        epsilon_high=rl.epsilon_high,
        scale_rewards=rl.scale_rewards,
        reward_weights=list(rl.rewards.values()),
        **vllm_rollouts.arguments(rl.rollouts, rl.max_prompt_length + rl.max_completion_length, stops),
        log_completions=False,
    )


def _trainer(
    renderer: Renderer,
    pool: RlPrompts,
    rl: RlSection,
    functions: list[Callable[..., Any]],
    arguments: GRPOConfig,
    writer: RolloutSampler,
) -> Any:
    with libraries.hidden(*libraries.UNUSED, *([] if arguments.use_vllm else ["vllm"])):
        from trl import GRPOTrainer

    class Trainer(
        Healthy, DividedRollouts, ExactRollouts, LoraPlus, WarmUp,
        Replay, Resampling, Ratios, Silent, SharedPrompts, Written, GRPOTrainer,
    ):  # fmt: skip
        ratio = rl.loraplus_lr_ratio

    trainer = Trainer(
        model=writer.adapted,
        reward_funcs=functions,
        args=arguments,
        train_dataset=pool.rows,
        processing_class=renderer.tokenizer,
    )
    trainer.pool, trainer.writer = pool, writer
    trainer.replayed, trainer.attempts = rl.replayed, rl.dynamic_sampling
    return trainer
