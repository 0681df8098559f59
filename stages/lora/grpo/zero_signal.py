"""Groups of equal rewards, and completions without an advantage, which training passes skip.

Each supported loss is Σᵢ fᵢ · Aᵢ / n, plus the KL term if there is one. Without it, a completion with Aᵢ = 0
adds exactly zero, and the normaliser n counts all completions, skipped ones included.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

PASS_METRICS = ("entropy", "tokens_saved")
"""Metrics that TRL and `GrpoTrainer._logprobs` log in a training pass, of the rows that it computes."""


@dataclass(frozen=True)
class Selection:
    """The rows of a micro batch that a training pass computes."""

    rows: Tensor
    """(computed,), in order."""
    written: Tensor
    """(rows, tokens): 1 for each token that the model wrote, 0 for padding and what closed its thought."""
    old_logprobs: Tensor | None
    """Log-probabilities at sampling, (rows, tokens), the policy's or the sampler's, if they are known."""
    has_gradient: bool
    """False if every advantage is zero."""

    @classmethod
    def from_batch(cls, inputs: dict[str, Any]) -> Selection:
        rows = inputs["advantages"].nonzero().flatten()
        written = inputs["completion_mask"] * inputs.get("tool_mask", 1)
        # If no row has an advantage, compute the shortest one as a stand-in, whose gradient is zero: every
        # process has to join the backward pass, or DDP hangs.
        computed = rows if len(rows) else inputs["completion_mask"].sum(1).argmin()[None]
        sampled = inputs.get("old_per_token_logps", inputs.get("sampling_per_token_logps"))
        return cls(computed, written, sampled, len(rows) > 0)

    def expand(self, log_probs: Tensor, entropies: Tensor) -> tuple[Tensor, Tensor]:
        """Extend values of the computed rows, (computed, tokens) each, to all rows, (rows, tokens) each.

        A skipped row gets its old log-probabilities, so that its ratio is 1; if they are None, TRL takes the
        policy's own instead, and zeros give the ratio 1, too. It gets the mean entropy of the computed
        tokens, so that the mean that TRL logs does not change.
        """
        shape, written = self.written.shape, self.written[self.rows]
        skipped = log_probs.new_zeros(shape) if self.old_logprobs is None else self.old_logprobs
        mean = (entropies * written).sum() / written.sum().clamp(min=1)
        return (
            skipped.index_copy(0, self.rows, log_probs),
            mean.expand(shape).index_copy(0, self.rows, entropies),
        )


@contextmanager
def metrics_of_computed(metrics: dict[str, list[float]], selection: Selection) -> Iterator[None]:
    """Context of a training pass: undo what it logs in PASS_METRICS if it computed only a stand-in row."""
    logged = {name: list(metrics[name]) for name in PASS_METRICS if name in metrics}
    yield
    if not selection.has_gradient:
        for name in PASS_METRICS:
            metrics.pop(name, None)  # an empty list would be logged as None
        metrics.update(logged)


def metrics_by_system(
    rewards: Tensor, is_system1: Tensor, lengths: Tensor, equal: Tensor, group: int
) -> Iterator[tuple[str, float]]:
    """Metrics that TRL logs of all completions, for each system apart.

    rewards, is_system1, lengths: (completions,), of all processes. equal: (groups,), of `equal_groups`.
    """
    for name, rows in (("system1", is_system1), ("system2", ~is_system1)):
        yield f"{name}/reward", rewards[rows].nanmean().item()
        yield f"{name}/completions/mean_length", lengths[rows].mean().item()
        yield f"{name}/frac_reward_zero_std", equal[rows[::group]].float().mean().item()


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
