"""Watches a training run: reports its progress, and stops it when it has gone wrong."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from stages.errors import UnusableResult

if TYPE_CHECKING:
    from stages.progress import Progress

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunInfo:
    """Names for the error messages of a training run."""

    rows: Callable[[dict[str, Any]], list[str]]
    """Finds the ids of the rows in a batch as the trainer prepared it."""
    memory_hint: str
    """Settings that lower the use of memory."""


def row_ids(
    names: Callable[[], dict[tuple[int, ...], str]], tokens: str, mask: str
) -> Callable[[dict[str, Any]], list[str]]:
    """A function that finds the ids of the rows in a batch.

    names: makes the table of token ids → row id; it is called only when a run has failed. tokens, mask: keys
    of the batch, (rows, tokens) each.
    """

    def ids(batch: dict[str, Any]) -> list[str]:
        id_of_tokens = names()
        pairs = zip(batch[tokens], batch[mask], strict=True)
        return [id_of_tokens.get(tuple(row[real.bool()].tolist()), "unknown") for row, real in pairs]

    return ids


class ProgressCallback(TrainerCallback):
    """Reports progress, and stops GRPO after too many steps in a row that could teach nothing."""

    def __init__(
        self, progress: Progress, title: str, steps: int, metrics: tuple[str, ...], patience: int = 0
    ) -> None:
        """metrics: the names of those on the progress line.

        patience: GRPO stops after this many steps in a row with equal rewards in every group.
        """
        self.progress, self.title, self.steps = progress, title, steps
        self.metrics, self.patience = metrics, patience

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        done = state.global_step
        self.progress.start(f"{self.title}, from step {done}" if done else self.title, self.steps - done)

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, float | None] | None = None, **_: Any
    ) -> None:
        logs = logs or {}
        if "train_runtime" in logs:
            return
        values = [(name.split("/")[-1], logs.get(name)) for name in self.metrics]
        line = "  ".join(f"{name} {value:.3g}" for name, value in values if value is not None)
        self.progress.advance(1, line)
        if not self.patience or "frac_reward_zero_std" not in logs:
            return  # a later pass over the same completions
        equal = equal_rewards(state.log_history)
        if equal == 1:
            log.warning(
                "all rewards of each group were equal in step %d: the step taught nothing", state.global_step
            )
        if equal >= self.patience:
            raise UnusableResult(
                f"all rewards of each group were equal in {equal} steps in a row, "
                f"up to step {state.global_step}: nothing is learned",
                "raise rl.num_generations or sft.system2_share, or rl.max_zero_signal_steps; to see SFT's "
                "answers: lorapar eval CONFIG --set 'eval.targets=[sft]'",
            )

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        steps = sum("frac_reward_zero_std" in row for row in state.log_history)
        if self.patience and steps and equal_rewards(state.log_history) == steps:
            log.warning(
                "in none of %d steps did the rewards of a group differ: RL taught nothing; "
                "sft.system2_share: 0.3 is a cold start",
                steps,
            )

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step >= state.max_steps:
            # The adapter itself is saved next. From a checkpoint here the library would train one step more.
            control.should_save = False


def equal_rewards(history: list[dict[str, Any]]) -> int:
    """Number of the last steps in a row with equal rewards in every group."""
    steps = [row["frac_reward_zero_std"] for row in history if "frac_reward_zero_std" in row]
    return next((i for i, share in enumerate(reversed(steps)) if share < 1), len(steps))
