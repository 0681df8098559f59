"""Metrics of GRPO that TRL does not log, and the rewards from which they are computed.

TRL logs importance ratios between vLLM's probabilities and the trainer's as it uses them: what the correction
masked is 0 by then, and what it truncated has its limit, so that a run whose samples are all thrown away
looks calm. Here they are logged as they were.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

RAW, BEYOND = "sampling/raw_ratio", "sampling/beyond_limit_share"


def raw_ratio_metrics(
    batch: dict[str, Tensor], of_tokens: bool, limit: float, gather: Callable[[Tensor], Tensor]
) -> Iterator[tuple[str, float]]:
    """Mean and largest raw ratio, and the share beyond the correction's limit, over all processes.

    The ratio is the trainer's probability over the sampler's, of each token that was written or of each
    completion. batch: the log-probabilities of both and the mask of what was written, (completions, tokens)
    each. A token for which the sampler gave none counts as equal, as in TRL. The two means weigh every
    process alike, however many tokens it has. gather: joins a value of every process.
    """
    mask = (batch["completion_mask"] * batch.get("tool_mask", 1)).bool()
    differences = batch["old_per_token_logps"] - batch["sampling_per_token_logps"]
    differences = differences.nan_to_num(nan=0.0) * mask
    raw = (differences[mask] if of_tokens else differences.sum(-1)).exp()
    yield f"{RAW}/mean", gather(raw.mean()).mean().item()
    yield f"{RAW}/max", gather(raw.max()).max().item()
    yield BEYOND, gather((raw > limit).float().mean()).mean().item()


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
