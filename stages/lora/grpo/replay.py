"""Steps of GRPO that replay System 1 prompts beside those of System 2."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Sampler


class ReplaySampler(Sampler[int]):
    """TRL's order of rows, with a fixed number of System 1 rows in each step.

    The data set has System 2 rows first and the replayed System 1 rows at its end. In an epoch each System 2
    row is drawn at most once. All System 1 rows are drawn before one comes again, and none is twice in a
    step, so `per_step` is at most `replayed`.
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
                # A new round begins: the rows left over come first, then the others, then the leftovers
                # again.
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


def summed(rewards: Tensor, weights: Tensor) -> Tensor:
    """(completions, functions) → (completions,), as TRL adds them up; NaN where no function applies."""
    total = (rewards * weights.to(rewards.device)).nansum(1)
    total[rewards.isnan().all(1)] = torch.nan
    return total


def equal_groups(rewards: Tensor, group: int) -> Tensor:
    """(completions,) → (groups,): whether all of a group earned the same, and so teach nothing.

    A completion with NaN is left out, as TRL does.
    """
    grouped = rewards.view(-1, group)
    low, high = (grouped.nan_to_num(value) for value in (torch.inf, -torch.inf))
    return low.amin(1) >= high.amax(1)
