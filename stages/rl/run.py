"""GRPO on the active System 2 elements, by TRL's GRPOTrainer, from the SFT adapter."""

from __future__ import annotations

from statistics import fmean
from typing import TYPE_CHECKING, Any

from stages.config import BaselineSection, LoraSection, ModelSection, PromptSection, RlSection, SandboxSection
from stages.lora.grpo import building
from stages.lora.training import loop, protected_kl
from stages.lora.training.curves import KL_FROM_START
from stages.lora.training.health import ProgressCallback
from stages.packing.support import is_prompt_learning
from stages.records import read_labels
from stages.rl.kept_adapters import KeptAdapters
from stages.rl.kl_probe import KlProbe
from stages.runtime import distributed
from stages.store.artifacts import KEPT_ADAPTERS

if TYPE_CHECKING:
    from stages.pipeline.context import StageContext

LENGTH = "completions/mean_length"
SHOWN = ("reward", "frac_reward_zero_std", LENGTH)
"""Metrics on the progress line."""


def run(
    context: StageContext,
    model: ModelSection,
    prompt: PromptSection,
    lora: LoraSection,
    baseline: BaselineSection | None,
    rl: RlSection,
    seed: int,
    sandbox: SandboxSection | None = None,
) -> dict[str, Any]:
    """Write `adapter/` and `history.json`; returns what was trained and what rewards it earned."""
    start = loop.StartingAdapter.from_artifacts("rl", context.adapter("sft", "score"), context.masks)
    labels, say = read_labels(context.labels), context.progress.say
    grpo = building.build(
        labels, start, context.checkpoints, say, model, prompt, lora, baseline, rl, seed, sandbox
    )
    prompts, trainer, peft_model = grpo.prompts, grpo.trainer, grpo.model
    title = f"rl on {prompts.system2_rows} prompts"
    trainer.add_callback(
        ProgressCallback(context.progress, title, grpo.steps, SHOWN, rl.max_zero_signal_steps)
    )
    if prompts.held_out and not is_prompt_learning(peft_model):
        if start.active is not None:
            start.restore(peft_model)
        trainer.add_callback(KlProbe(trainer, prompts.held_out, grpo.sampler, rl))
    protected_kl.watch(trainer, start, context.protected, grpo.renderer, rl.kl_probe_steps)
    kept = KeptAdapters(peft_model, model, context.checkpoints.folder / KEPT_ADAPTERS, rl.keep_steps)
    trainer.add_callback(kept)
    summary = loop.train(trainer, peft_model, start, context.out, model, context.checkpoints)
    if distributed.is_main():
        kept.copy(context.out / KEPT_ADAPTERS)
    return {
        "prompts": prompts.system2_rows,
        "replayed_prompts": prompts.replayed,
        **({"unrewardable_prompts": prompts.unrewardable} if prompts.unrewardable else {}),
        "cut_prompts" if rl.too_long == "truncate_left" else "dropped_prompts": prompts.long,
        "prompt": grpo.renderer.digest(),
        **({"sandbox": grpo.sandbox.name} if grpo.sandbox else {}),
        **_earned(loop.history(trainer), rl.prompts_per_step * rl.num_generations),
        **summary,
    }


def _earned(history: list[dict[str, Any]], per_step: int) -> dict[str, Any]:
    """Rewards in the first and last quarter of the steps that sampled completions, and what they cost.

    A reward is None where no reward applied to any completion.
    """
    sampled = [row for row in history if LENGTH in row]
    quarter = max(1, len(sampled) // 4)
    quarters = sampled[:quarter], sampled[-quarter:]
    first, last = ([row["reward"] for row in steps if "reward" in row] for steps in quarters)
    kl = [row[KL_FROM_START] for row in history if KL_FROM_START in row]
    return {
        "equal_reward_steps": sum(row.get("frac_reward_zero_std") == 1 for row in history),
        "reward_first_quarter": fmean(first) if first else None,
        "reward_last_quarter": fmean(last) if last else None,
        "length_last_quarter": fmean(row[LENGTH] for row in sampled[-quarter:]),
        "completions": int(sum(per_step + row.get("resampled/completions", 0) for row in sampled)),
        **({"kl_from_start": kl[-1]} if kl else {}),
    }
