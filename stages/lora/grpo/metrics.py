"""Metrics of GRPO that TRL does not log, and the rewards from which they are computed."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor


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
