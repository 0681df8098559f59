"""Watches a training run: rehearses the longest micro batch, reports progress, stops what has gone wrong."""

import logging
from collections.abc import Callable
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor
from transformers import TrainerCallback

from stages.errors import UnusableResult
from stages.progress import Progress
from stages.prompts.renderer import Row

log = logging.getLogger(__name__)


class ProgressCallback(TrainerCallback):
    """Reports progress, and stops GRPO after too many steps in a row that could teach nothing."""

    def __init__(self, progress: Progress, title: str, metrics: dict[str, str], patience: int = 0) -> None:
        """metrics: the names of those on the progress line, and what people call them.

        patience: GRPO stops after this many steps in a row with equal rewards in every group.
        """
        self.progress, self.title, self.metrics, self.patience = progress, title, metrics, patience

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        done = state.global_step
        self.progress.start(f"{self.title}, from step {done}" if done else self.title, state.max_steps - done)

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, float | None] | None = None, **_: Any
    ) -> None:
        logs = logs or {}
        if "train_runtime" in logs:
            return
        values = [(label, logs.get(name)) for name, label in self.metrics.items()]
        line = "  ".join(f"{label} {value:.3g}" for label, value in values if value is not None)
        self.progress.advance(1, line)
        if not self.patience or "frac_reward_zero_std" not in logs:
            return
        steps = [row["frac_reward_zero_std"] for row in state.log_history if "frac_reward_zero_std" in row]
        # The last steps in a row with equal rewards in every group.
        equal = next((i for i, share in enumerate(reversed(steps)) if share < 1), len(steps))
        if equal == 1:
            log.warning(
                "all rewards of each group were equal in step %d: it taught nothing; if no other step does, "
                "try sft.system2_share: 0.3, a cold start",
                state.global_step,
            )
        if equal >= self.patience:
            raise UnusableResult(
                f"all rewards of each group were equal in {equal} steps in a row, "
                f"up to step {state.global_step}: nothing is learned",
                "raise rl.num_generations or sft.system2_share, or rl.max_zero_signal_steps; to see SFT's "
                "answers: lorapar eval CONFIG --set 'eval.targets=[sft]'",
            )

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step >= state.max_steps:
            # The adapter itself is saved next. From a checkpoint here the library would train one step more.
            control.should_save = False


class LongestBatch(TrainerCallback):
    """Forward and backward pass through the longest micro batch before step 1, without an update.

    A lack of memory shows in the first seconds, not after hours. No weight, metric or random state changes.
    A resumed run skips it.
    """

    def __init__(self, trainer: Any, loss: Callable[[], Tensor], title: str) -> None:
        """loss: computes the loss of that micro batch. title: names it in an error message."""
        self.trainer, self.loss, self.title = trainer, loss, title

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step:
            return
        trainer = self.trainer
        trainer.model.train()
        with (
            trainer.memory(f"in the longest micro batch, {self.title}"),
            torch.random.fork_rng(),
            trainer.accelerator.no_sync(trainer.model_wrapped),
        ):
            trainer.accelerator.backward(self.loss())
        trainer.model.zero_grad()
        trainer._metrics["train"].clear()


def longest_of_sft(trainer: Any, rows: list[Row]) -> LongestBatch:
    size = trainer.args.per_device_train_batch_size
    longest = sorted(rows, key=lambda row: len(row.input_ids))[-size:]

    def loss() -> Tensor:
        batch = trainer.data_collator([{"input_ids": r.input_ids, "labels": r.labels} for r in longest])
        inputs = send_to_device(batch, trainer.accelerator.device)
        value: Tensor = trainer.compute_loss(trainer.model_wrapped, inputs)
        trainer._total_train_tokens = 0  # compute_loss counts tokens
        return value

    return LongestBatch(trainer, loss, f"{len(longest)} rows of up to {len(longest[-1].input_ids)} tokens")
