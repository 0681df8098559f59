"""Completions of GRPO whose advantage is zero are not computed in the training passes: they have no gradient.

In a group whose completions all earned the same every advantage is zero, so it costs its sampling alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


class Silent:
    """Mixin for GRPOTrainer, to stand before SharedPrompts.

    Every loss of ours is a sum over completions of a factor times the advantage, plus the KL term if there is
    one: without it the rows left out add exactly zero, and what divides the sum counts them all the same. Off
    with a KL term, a router's loss, and wherever `sharing` is: that is TRL's own way.
    """

    sharing: bool
    aux_loss_enabled: bool
    beta: float
    _metrics: Any
    _spoken: Tensor | None = None
    """In a training pass: the rows that are computed, in order."""
    _old: Tensor | None = None
    """The log-probabilities at sampling, if they are known, (rows, tokens)."""

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        if self.sharing and not self.beta and not self.aux_loss_enabled:
            rows = inputs["advantages"].nonzero().flatten()
            # One at least: each process of several has to take part in the backward pass.
            self._spoken = rows if len(rows) else rows.new_zeros(1)
            self._old = inputs.get("old_per_token_logps")
            self._metrics["train"]["completions_skipped"].append(1 - len(rows) / len(inputs["advantages"]))
        try:
            return super()._compute_loss(model, inputs)  # type: ignore[misc, no-any-return]
        finally:
            self._spoken = None

    def _get_per_token_logps_and_entropies(
        self,
        model: Any,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        *args: Any,
        **more: Any,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Of a row left out: the old log-probabilities, and the mean entropy of the tokens computed."""
        method = super()._get_per_token_logps_and_entropies  # type: ignore[misc]
        rows = self._spoken
        if rows is None or len(rows) == len(input_ids):
            return method(model, input_ids, attention_mask, logits_to_keep, *args, **more)  # type: ignore[no-any-return]
        mask = attention_mask[rows]
        log_probs, entropies, _ = method(model, input_ids[rows], mask, logits_to_keep, *args, **more)
        shape = (len(input_ids), logits_to_keep)
        whole = log_probs.new_zeros(shape) if self._old is None else self._old
        real = mask[:, -logits_to_keep:]
        mean = (entropies * real).sum() / real.sum().clamp(min=1)
        return (
            whole.index_copy(0, rows, log_probs),
            mean.expand(shape).index_copy(0, rows, entropies),
            None,
        )
