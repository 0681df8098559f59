"""Completions of GRPO whose advantage is zero are left out of the training passes: they have no gradient.

In a group whose completions all earned the same every advantage is zero, so it costs its sampling alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

OF_COMPUTED = ("entropy", "tokens_saved")
"""Metrics that tell of the completions that are computed; without any there is nothing to tell."""


class Silent:
    """Mixin for GRPOTrainer, to stand before SharedPrompts.

    Every loss of ours is a sum over completions of a factor times the advantage, plus the KL term if there is
    one: without it the rows left out add exactly zero, and what divides the sum counts them all the same. All
    are computed where there is a KL term or a router's loss, and where `sharing` is off: that is TRL's way.
    """

    sharing: bool
    aux_loss_enabled: bool
    beta: float
    _metrics: Any
    _computed: Tensor | None = None
    """In a training pass: the rows that are computed, in order."""
    _old: Tensor | None = None
    """The log-probabilities at sampling, if they are known, (rows, tokens)."""

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        if not self.sharing or self.beta or self.aux_loss_enabled:
            return super()._compute_loss(model, inputs)  # type: ignore[misc, no-any-return]
        metrics = self._metrics["train"]
        rows = inputs["advantages"].nonzero().flatten()
        before = {name: list(metrics[name]) for name in OF_COMPUTED if name in metrics}
        # One at least, the shortest: each process of several has to take part in the backward pass.
        self._computed = rows if len(rows) else inputs["completion_mask"].sum(1).argmin()[None]
        self._old = inputs.get("old_per_token_logps")
        metrics["completions_skipped"].append(1 - len(self._computed) / len(inputs["advantages"]))
        try:
            loss: Tensor = super()._compute_loss(model, inputs)  # type: ignore[misc]
        finally:
            self._computed = None
        if not len(rows):
            for name in OF_COMPUTED:
                metrics.pop(name, None)  # an empty list would be logged as None
            metrics.update(before)
        return loss

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
        rows = self._computed
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
