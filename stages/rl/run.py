"""GRPO on the active System 2 elements, by TRL's GRPOTrainer, from the SFT adapter."""

from __future__ import annotations

import shutil
from pathlib import Path
from statistics import fmean
from typing import Any

from transformers import TrainerCallback

from stages.config import ModelSection
from stages.lora.adapter import adapter
from stages.lora.grpo import building
from stages.lora.training import loop, protected_kl
from stages.lora.training.curves import KL_FROM_START
from stages.lora.training.health import ProgressCallback
from stages.packing.support import is_prompt_learning
from stages.pipeline.context import StageContext
from stages.rl.kl_probe import KlProbe
from stages.runtime import distributed
from stages.store.artifacts import KEPT_ADAPTERS

LENGTH = "completions/mean_length"
SHOWN = {"reward": "reward", "frac_reward_zero_std": "groups without signal", LENGTH: "tokens"}
"""Metrics on the progress line, and their names there."""


def run(context: StageContext, **sections: Any) -> dict[str, Any]:
    """Write `adapter/` and `history.json`; returns what was trained and what rewards it earned."""
    run = building.Grpo(context=context, **sections)
    rl, trainer, prompts = run.rl, run.build(), run.prompts
    title = f"rl on {prompts.system2_rows} prompts"
    trainer.add_callback(ProgressCallback(context.progress, title, SHOWN, rl.max_zero_signal_steps))
    if prompts.held_out and not is_prompt_learning(trainer.model):
        if run.start.active is not None:
            run.start.restore(trainer.model)
        trainer.add_callback(KlProbe(trainer))
    protected_kl.watch(trainer, run, rl.kl_probe_steps)
    kept = KeptAdapters(run.model, context.checkpoints.folder / KEPT_ADAPTERS, rl.keep_steps)
    trainer.add_callback(kept)
    summary = loop.train(trainer, run)
    if distributed.is_main():
        kept.copy(context.out / KEPT_ADAPTERS)
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


class KeptAdapters(TrainerCallback):
    """Writes the adapter after each of these steps, beside the checkpoints: a resumed run finds it there."""

    def __init__(self, base: ModelSection, folder: Path, steps: list[int]) -> None:
        self.base, self.folder, self.steps = base, folder, steps

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if state.global_step in self.steps and distributed.is_main():
            # What a killed run left half written is written again, when the resumed one comes to the step.
            folder = self.folder / str(state.global_step)
            shutil.rmtree(folder, ignore_errors=True)
            adapter.save(model, folder, self.base)

    def copy(self, out: Path) -> None:
        """Copy what was kept into the artifact."""
        # Not written there at once: the folder of an artifact is emptied when a killed run begins again.
        if self.folder.exists():
            shutil.copytree(self.folder, out)
