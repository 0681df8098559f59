"""Log-probabilities of chosen tokens, computed from hidden states in parts, without keeping any logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

PART = 2**24
"""Logits that exist at a time: 64 MB in float32. Larger parts were not faster, smaller ones were."""


@dataclass(frozen=True)
class TokenLogprobs:
    """For each hidden state: (tokens,) each, at least float32."""

    log_probs: Tensor
    entropy: Tensor
    """Of the whole distribution; without gradient."""
    is_top1: Tensor
    """Whether no other token is likelier; bool."""


def selected_logprobs(
    hidden: Tensor, head: nn.Linear, targets: Tensor, temperature: float = 1.0
) -> TokenLogprobs:
    """What the head gives for `targets` (tokens,) at the hidden states (tokens, width).

    Only the log-probabilities have a gradient, and it goes to the hidden states alone: the head is frozen.
    """
    return TokenLogprobs(*_Chosen.apply(hidden, head.weight, head.bias, targets, temperature))


class _Chosen(torch.autograd.Function):
    """The gradient of log p(y) with respect to the hidden state is (w_y − Σ p_v w_v) / temperature.

    It is computed in the forward pass, while the part's probabilities exist; what comes from above is one
    number per token. So the head's matrix is read twice, not three times as with logits that are made again.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, temperature: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        count = len(targets)
        log_probs, entropy = (torch.empty(count, dtype=wide, device=hidden.device) for _ in range(2))
        likeliest = torch.empty(count, dtype=torch.bool, device=hidden.device)
        slope = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        size = max(1, PART // weight.shape[0])
        for at in range(0, count, size):
            part = slice(at, at + size)
            logits = nn.functional.linear(hidden[part], weight, bias).to(wide).div_(temperature)
            own = logits.gather(1, targets[part, None])[:, 0]
            most = logits.amax(1)
            likeliest[part] = own == most
            shifted = logits.sub_(most[:, None])
            p = shifted.exp()
            total = p.sum(1)
            # Σ p·x by one product per row, not by a matrix of products
            mean = torch.linalg.vecdot(p, shifted) / total
            log_probs[part] = own - most - total.log()
            entropy[part] = total.log() - mean
            if slope is not None:
                p.div_(total[:, None]).neg_()
                p.scatter_add_(1, targets[part, None], torch.ones_like(own)[:, None])
                slope[part] = (p.to(weight.dtype) @ weight).div_(temperature)
        ctx.save_for_backward(slope)
        ctx.mark_non_differentiable(entropy, likeliest)
        return log_probs, entropy, likeliest

    @staticmethod
    def backward(ctx: Any, above: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        (slope,) = ctx.saved_tensors
        return (slope * above[:, None]).to(slope.dtype), None, None, None, None
