"""Steps of GRPO that replay System 1 prompts beside those of System 2."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Sampler


class ReplaySampler(Sampler[int]):
    """TRL's order of rows, with a fixed number of System 1 rows in each step.

    The data set has System 2 rows first and the replayed System 1 rows at its end. An epoch draws each System
    2 row at most once. It draws all System 1 rows before it repeats one; the next epoch begins anew. No row
    is twice in a step, which needs `per_step` ≤ `replayed`.
    """

    def __init__(self, inner: Any, replayed: int, per_step: int) -> None:
        """inner: TRL's RepeatSampler. replayed: rows at the end, drawn `per_step` at a time."""
        self.inner, self.replayed, self.per_step = inner, replayed, per_step
        self.system2 = inner.num_samples - replayed
        self.generator = inner.generator

    def __len__(self) -> int:
        inner = self.inner
        return self._batches() * inner.batch_size * inner.mini_repeat_count * inner.repeat_count

    def _batches(self) -> int:
        return self.system2 // (self.inner.batch_size - self.per_step)

    def __iter__(self) -> Iterator[int]:
        system2_rows = self._shuffled(range(self.system2))
        queue: list[int] = []  # System 1 rows still to be drawn in this round
        size = self.inner.batch_size - self.per_step
        for batch in range(self._batches()):
            if len(queue) < self.per_step:
                # Begin a new round, every row once. Before it come the rows left over from the last round,
                # and in it they come at the end: the per_step rows that are taken next are all different,
                # because queue and not_queued are disjoint and have replayed ≥ per_step rows together.
                every = range(self.system2, self.system2 + self.replayed)
                not_queued = self._shuffled([row for row in every if row not in queue])
                queue = [*queue, *not_queued, *self._shuffled(queue)]
            system1_rows, queue = queue[: self.per_step], queue[self.per_step :]
            # Mixed within the step, so that the last process or micro batch is not all of one kind.
            step = self._shuffled([*system2_rows[batch * size :][:size], *system1_rows])
            for _ in range(self.inner.repeat_count):
                yield from (row for row in step for _ in range(self.inner.mini_repeat_count))

    def _shuffled(self, rows: Sequence[int]) -> list[int]:
        return [rows[i] for i in torch.randperm(len(rows), generator=self.generator).tolist()]


def metrics_by_system(
    rewards: Tensor, is_system1: Tensor, lengths: Tensor, equal: Tensor, group: int
) -> Iterator[tuple[str, float]]:
    """Metrics that TRL logs of all completions, for each system apart.

    rewards, is_system1, lengths: (completions,), of all processes. equal: (groups,), of `equal_groups`.
    """
    is_system1_group = is_system1[::group]
    for name, rows, groups in (
        ("system1", is_system1, is_system1_group),
        ("system2", ~is_system1, ~is_system1_group),
    ):
        yield f"{name}/reward", rewards[rows].nanmean().item()
        yield f"{name}/completions/mean_length", lengths[rows].mean().item()
        yield f"{name}/frac_reward_zero_std", equal[groups].float().mean().item()


def total_rewards(rewards: Tensor, weights: Tensor) -> Tensor:
    """(completions, functions) → (completions,), as TRL adds them up; NaN where no function applies."""
    total = (rewards * weights.to(rewards.device)).nansum(1)
    total[rewards.isnan().all(1)] = torch.nan
    return total


def equal_groups(rewards: Tensor, group: int) -> Tensor:
    """(completions,) → (groups,): True if all completions of a group earned the same, so it has no signal.

    Completions whose reward is NaN do not count, as in TRL.
    """
    grouped = rewards.view(-1, group)
    # NaN becomes ∞ for the minimum and −∞ for the maximum, so it decides neither. min ≥ max then says that
    # all other rewards are equal. A group of NaN alone has ∞ ≥ −∞, and counts as equal, too.
    lowest = grouped.nan_to_num(torch.inf).amin(1)
    highest = grouped.nan_to_num(-torch.inf).amax(1)
    return lowest >= highest
