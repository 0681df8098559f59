"""Log-probabilities of given target tokens, computed from hidden states in chunks, without keeping logits."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

CHUNK_LOGITS = 2**24
"""Logits that exist at a time on a CPU, 64 MB in float32: more were not faster, fewer were slower."""
GPU_SHARE, LOGIT_BYTES = 1 / 40, 8
"""Share of a GPU's memory for a chunk, and bytes of a logit: twice in float32."""


@dataclass(frozen=True)
class TokenLogprobs:
    """Statistics of the prediction at each hidden state: (tokens,) each, floats in float32 or wider."""

    log_probs: Tensor
    """Log-probability of the target."""
    entropy: Tensor
    """Entropy of the distribution over all tokens; without gradient."""
    is_top1: Tensor
    """bool: no token is likelier than the target."""


def selected_logprobs(
    hidden: Tensor, head: nn.Linear, targets: Tensor, temperature: float = 1.0
) -> TokenLogprobs:
    """Apply `head` to hidden states and return the statistics of `targets`.

    hidden: (tokens, width). targets: (tokens,). Only the log-probabilities have a gradient, and only with
    respect to the hidden states: the head is frozen.
    """
    return TokenLogprobs(*_SelectedLogprobs.apply(hidden, head.weight, head.bias, targets, temperature))


def _chunk_logits(device: torch.device) -> int:
    # Each chunk reads the whole head: n tokens are n FLOP per byte, of which a GPU needs hundreds to be busy.
    if device.type != "cuda":
        return CHUNK_LOGITS
    memory = torch.cuda.get_device_properties(device).total_memory
    return max(CHUNK_LOGITS, int(memory * GPU_SHARE / LOGIT_BYTES))


class _SelectedLogprobs(torch.autograd.Function):
    """log p(y) of a target y, with its gradient computed in the forward pass, one chunk of tokens at a time.

    With the logits z = (W h + b) / T, p = softmax(z) and m = max z:

    - log p(y) = (z_y − m) − log Σ_v exp(z_v − m)
    - entropy H = log Σ_v exp(z_v − m) − Σ_v p_v (z_v − m)
    - ∂ log p(y) / ∂h = (w_y − Σ_v p_v w_v) / T

    The last line needs p, which exists in the forward pass only. The gradient that arrives in the backward
    pass is one number per token, by which it is multiplied. So the head's matrix is read twice, and not three
    times as when the backward pass computes the logits again.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, temperature: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        count = len(targets)
        log_probs, entropy = (torch.empty(count, dtype=wide, device=hidden.device) for _ in range(2))
        is_top1 = torch.empty(count, dtype=torch.bool, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        size = max(1, _chunk_logits(hidden.device) // weight.shape[0])
        for start in range(0, count, size):
            chunk = slice(start, start + size)
            # (chunk, vocabulary): z
            logits = nn.functional.linear(hidden[chunk], weight, bias).to(wide).div_(temperature)
            target_logits = logits.gather(1, targets[chunk, None])[:, 0]  # (chunk,): z_y
            largest = logits.amax(1)  # (chunk,): m
            is_top1[chunk] = target_logits == largest
            shifted = logits.sub_(largest[:, None])  # z − m, so that exp does not overflow
            p = shifted.exp()  # not normalised yet: Σ_v p_v = total
            total = p.sum(1)
            mean = shifted.mul_(p).sum(1) / total  # Σ_v p_v (z_v − m), in place: no third matrix
            del logits, shifted
            log_probs[chunk] = target_logits - largest - total.log()
            entropy[chunk] = total.log() - mean
            if grad_hidden is not None:
                # Coefficients of the rows of W in the gradient: −p_v, plus 1 at v = y.
                p.div_(total[:, None]).neg_()
                p.scatter_add_(1, targets[chunk, None], torch.ones_like(target_logits)[:, None])
                grad_hidden[chunk] = (p.to(weight.dtype) @ weight).div_(temperature)  # (chunk, width)
            del p  # or it would stand beside the next chunk's logits
        ctx.save_for_backward(grad_hidden)
        ctx.mark_non_differentiable(entropy, is_top1)
        return log_probs, entropy, is_top1

    @staticmethod
    def backward(ctx: Any, grad_log_probs: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        (grad_hidden,) = ctx.saved_tensors
        # One gradient for each argument of `forward`; all but the hidden states are constants.
        return (grad_hidden * grad_log_probs[:, None]).to(grad_hidden.dtype), None, None, None, None
