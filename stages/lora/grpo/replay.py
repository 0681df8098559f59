"""Steps of GRPO that replay System 1 prompts beside those of System 2."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import Sampler

if TYPE_CHECKING:
    from stages.lora.grpo.prompts import RlPrompts


class ReplaySampler(Sampler[int]):
    """TRL's order of rows, but that each step takes so many of the last rows and the others from the first.

    In an epoch each of the first rows is drawn at most once. The last ones are all drawn before one comes
    again, and none is twice in a step, so `per_step` is at most `last`.
    """

    def __init__(self, usual: Any, last: int, per_step: int) -> None:
        """usual: TRL's RepeatSampler. last: rows at the end that are drawn apart, `per_step` at a time."""
        self.usual, self.last, self.per_step = usual, last, per_step
        self.first = usual.num_samples - last
        self.generator = usual.generator

    def __len__(self) -> int:
        usual = self.usual
        return self._batches() * usual.batch_size * usual.mini_repeat_count * usual.repeat_count

    def _batches(self) -> int:
        return self.first // (self.usual.batch_size - self.per_step)

    def __iter__(self) -> Iterator[int]:
        first = self._shuffled(range(self.first))
        last: list[int] = []
        size = self.usual.batch_size - self.per_step
        for batch in range(self._batches()):
            if len(last) < self.per_step:  # the rest comes first; no row is twice in a step
                rows = range(self.first, self.first + self.last)
                others = self._shuffled([row for row in rows if row not in last])
                last = [*last, *others, *self._shuffled(last)]
            drawn, last = last[: self.per_step], last[self.per_step :]
            # Mixed within the step, so that the last process or micro batch is not all of one kind.
            step = self._shuffled([*first[batch * size :][:size], *drawn])
            for _ in range(self.usual.repeat_count):
                yield from (row for row in step for _ in range(self.usual.mini_repeat_count))

    def _shuffled(self, rows: Sequence[int]) -> list[int]:
        return [rows[i] for i in torch.randperm(len(rows), generator=self.generator).tolist()]


class Replay:
    """Mixin for GRPOTrainer, to stand before it among the base classes.

    Set `pool` and `replayed` before `train`. What is logged of the rewards and lengths of all completions is
    then logged for each system, too, as `system1/…` and `system2/…`. `frac_reward_zero_std` is always the
    share of groups that teach nothing.
    """

    pool: RlPrompts
    replayed: int
    """System 1 prompts of a step."""
    accelerator: Any
    model: Any
    num_generations: int
    reward_weights: Tensor
    _metrics: Any
    _equal: Tensor
    """Of the step's groups, whether their completions earned the same."""

    def _get_train_sampler(self, dataset: Any = None) -> Any:
        usual = super()._get_train_sampler(dataset)  # type: ignore[misc]
        return ReplaySampler(usual, self.pool.replayed, self.replayed) if self.replayed else usual

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> Any:
        found = super()._generate_and_score_completions(inputs)  # type: ignore[misc]
        if self.model.training:
            # TRL looks at the deviation that it divides by: under `batch` that of all completions together.
            self._metrics["train"]["frac_reward_zero_std"][-1] = self._equal.float().mean().item()
        return found

    def _calculate_rewards(
        self, inputs: list[dict[str, Any]], prompts: Any, completions: Any, completion_ids: list[list[int]]
    ) -> Tensor:
        found: Tensor = super()._calculate_rewards(  # type: ignore[misc]
            inputs, prompts, completions, completion_ids
        )
        rewards = summed(found, self.reward_weights)
        self._equal = equal_groups(rewards, self.num_generations)
        if self.replayed and self.model.training:
            local = [
                torch.tensor(values, device=found.device)
                for values in (list(map(self.pool.is_replayed, prompts)), list(map(len, completion_ids)))
            ]
            fast, lengths = self.accelerator.gather(local)
            self._log_by_system(rewards, fast, lengths.float())
        return found

    def _log_by_system(self, rewards: Tensor, fast: Tensor, lengths: Tensor) -> None:
        """All (completions,), of all processes. fast: whether a completion's prompt is of System 1."""
        equal = self._equal.float()
        of_groups = fast[:: self.num_generations]
        for name, rows, groups in (("system1", fast, of_groups), ("system2", ~fast, ~of_groups)):
            values = {
                "reward": rewards[rows].nanmean(),
                "completions/mean_length": lengths[rows].mean(),
                "frac_reward_zero_std": equal[groups].mean(),
            }
            for key, value in values.items():
                self._metrics["train"][f"{name}/{key}"].append(value.item())


def summed(rewards: Tensor, weights: Tensor) -> Tensor:
    """(completions, functions) → (completions,), as TRL adds them up; NaN where no function applies."""
    found = (rewards * weights.to(rewards.device)).nansum(1)
    found[rewards.isnan().all(1)] = torch.nan
    return found


def equal_groups(rewards: Tensor, group: int) -> Tensor:
    """(completions,) → (groups,): whether all of a group earned the same, and so teach nothing.

    A completion with NaN is left out, as TRL does.
    """
    grouped = rewards.view(-1, group)
    low, high = (grouped.nan_to_num(value) for value in (torch.inf, -torch.inf))
    return low.amin(1) >= high.amax(1)
