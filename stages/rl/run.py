"""GRPO on the active System 2 elements, by TRL's GRPOTrainer, from the SFT adapter."""

from statistics import fmean
from typing import Any

from stages.lora.grpo import building
from stages.lora.training import loop
from stages.lora.training.health import ProgressCallback
from stages.pipeline.context import StageContext

LENGTH = "completions/mean_length"
SHOWN = {"reward": "reward", "frac_reward_zero_std": "groups without signal", LENGTH: "tokens"}
"""Metrics on the progress line, and their names there."""


def run(context: StageContext, **sections: Any) -> dict[str, Any]:
    """Write `adapter/` and `history.json`; returns what was trained and what rewards it earned."""
    run = building.Grpo(context=context, section=sections.pop("rl"), **sections)
    rl, trainer, prompts = run.section, run.build(), run.prompts
    title = f"rl on {prompts.system2_rows} prompts"
    trainer.add_callback(ProgressCallback(context.progress, title, SHOWN, rl.max_zero_signal_steps))
    summary = loop.train(trainer, run)
    return {
        "prompts": prompts.system2_rows,
        "replayed_prompts": prompts.replayed,
        **({"unrewardable_prompts": prompts.unrewardable} if prompts.unrewardable else {}),
        "cut_prompts" if rl.too_long == "truncate_left" else "dropped_prompts": prompts.long,
        "prompt": run.renderer.digest(),
        **({"sandbox": run.backend.name} if run.backend else {}),
        **_earned(loop.history(trainer), rl.prompts_per_step * rl.num_generations),
        **summary,
    }


def _earned(history: list[dict[str, Any]], per_step: int) -> dict[str, Any]:
    """Rewards in the first and last quarter of the steps that sampled completions, and their number.

    A reward is None where no reward applied to any completion.
    """
    sampled = [row for row in history if LENGTH in row]
    quarter = max(1, len(sampled) // 4)
    quarters = sampled[:quarter], sampled[-quarter:]
    first, last = ([row["reward"] for row in steps if "reward" in row] for steps in quarters)
    return {
        "reward_first_quarter": fmean(first) if first else None,
        "reward_last_quarter": fmean(last) if last else None,
        "completions": per_step * len(sampled),
    }
