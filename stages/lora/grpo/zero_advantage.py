"""Completions of GRPO whose advantage is zero are left out of the training passes: they have no gradient.

Each supported loss is Σᵢ fᵢ · Aᵢ, plus the KL term if there is one. Without it, a completion with Aᵢ = 0 adds
exactly zero, and what divides the sum counts it all the same. A group whose completions all earned the same
has Aᵢ = 0 throughout, so it costs its sampling alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

OF_COMPUTED = ("entropy", "tokens_saved")
"""Metrics of the completions that are computed."""


@dataclass(frozen=True)
class Selection:
    """The rows of a micro batch that a training pass computes."""

    rows: Tensor
    """(computed,), in order."""
    old_logprobs: Tensor | None
    """Log-probabilities at sampling, (rows, tokens), if they are known."""
    has_gradient: bool
    """False if every advantage is zero."""

    @classmethod
    def of(cls, inputs: dict[str, Any]) -> Selection:
        rows = inputs["advantages"].nonzero().flatten()
        # At least one, the shortest: every process has to join the backward pass, or DDP hangs.
        computed = rows if len(rows) else inputs["completion_mask"].sum(1).argmin()[None]
        return cls(computed, inputs.get("old_per_token_logps"), len(rows) > 0)

    def expand(
        self, log_probs: Tensor, entropies: Tensor, completion_mask: Tensor, rows: int
    ) -> tuple[Tensor, Tensor]:
        """Values of the computed rows, (computed, tokens) each, as values of all rows, (rows, tokens).

        A skipped row gets its old log-probabilities, so that its ratio is 1, and the mean entropy of the
        computed tokens, so that it leaves that mean as it is.
        """
        shape = (rows, log_probs.shape[1])
        skipped = log_probs.new_zeros(shape) if self.old_logprobs is None else self.old_logprobs
        mean = (entropies * completion_mask).sum() / completion_mask.sum().clamp(min=1)
        return (
            skipped.index_copy(0, self.rows, log_probs),
            mean.expand(shape).index_copy(0, self.rows, entropies),
        )


@contextmanager
def metrics_of_computed(metrics: dict[str, list[float]], selection: Selection) -> Iterator[None]:
    """Drop what the pass inside logs of its completions if none of them has a gradient."""
    logged = {name: list(metrics[name]) for name in OF_COMPUTED if name in metrics}
    yield
    if not selection.has_gradient:
        for name in OF_COMPUTED:
            metrics.pop(name, None)  # an empty list would be logged as None
        metrics.update(logged)
