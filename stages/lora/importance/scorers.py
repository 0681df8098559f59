"""Importance of every single LoRA element for one system, from the per-example gradients of a batch.

The gradient of one example's loss with respect to a LoRA weight W (out, in) is Σ_t δ_t x_tᵀ, with the layer's
input x and the gradient δ of its output. One forward and backward pass of a batch therefore gives the
gradients of all its examples. The loss is the sum over examples of each example's mean answer-token loss, so
that each gradient depends on one example only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from stages.errors import MeaninglessError
from stages.registry import Registry

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from stages.packing.batch import PackedBatch
    from stages.prompts.renderer import Row

scorers: Registry = Registry("scorer")
"""Trait `product`: the score is gradient times value, which is zero everywhere while B = 0. Trait `pilot`:
the score takes the value after a pilot run (`pilot.py`) in place of gradient and Fisher."""


@dataclass
class Moments:
    """Sums over examples, one tensor per LoRA weight, float32, of the weight's shape."""

    gradient: dict[str, Tensor]
    """Σ g"""
    square: dict[str, Tensor]
    """Σ g²"""
    examples: int
    loss: float
    """Σ of the examples' mean answer-token losses."""


@scorers.add("product")
def taylor2(value: Tensor, gradient: Tensor, fisher: Tensor) -> Tensor:
    """|g·φ − ½·F·φ²| with the mean gradient g and the diagonal Fisher F (arXiv 2507.20999, §3)."""
    return (gradient * value - 0.5 * fisher * value * value).abs()


@scorers.add("product")
def taylor1(value: Tensor, gradient: Tensor, fisher: Tensor) -> Tensor:
    """|g·φ|: the first-order term alone (Molchanov et al. 2019, arXiv 1906.10771)."""
    return (gradient * value).abs()


@scorers.add()
def fisher(value: Tensor, gradient: Tensor, fisher: Tensor) -> Tensor:
    """F, the mean of squared per-example gradients: the diagonal of the empirical Fisher information."""
    return fisher


@scorers.add()
def grad2(value: Tensor, gradient: Tensor, fisher: Tensor) -> Tensor:
    """g², the square of the mean gradient (SPT's sensitivity, arXiv 2303.08566)."""
    return gradient.square()


@scorers.add()
def magnitude(value: Tensor, gradient: Tensor, fisher: Tensor) -> Tensor:
    """|φ|: needs no gradients and is the same for both systems."""
    return value.abs()


@scorers.add("pilot")
def moved(value: Tensor, after: Tensor) -> Tensor:
    """|φ′ − φ|: how far a pilot run of 12 steps on the examples moves it (after arXiv 2505.11711)."""
    return (after - value).abs()


@contextmanager
def _captured(
    model: PreTrainedModel, weights: dict[str, nn.Module], sums: Moments, row: PackedBatch | None
) -> Iterator[None]:
    """Inside, a backward pass adds the per-example gradients of every LoRA layer to `sums`.

    row: where the examples stand in it; None if they are padded rows of a batch.
    """
    import torch

    handles, pending = [], dict.fromkeys(weights, 0)

    def apart(x: Tensor) -> Tensor:
        """(examples, longest, width) of what a layer sees."""
        return x if row is None else row.suffixes.spread(x[0])

    def watch(name: str):  # type: ignore[no-untyped-def]
        def forward(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            x = inputs[0].detach()
            pending[name] += 1
            if x.dim() != 3 or pending[name] != 1:
                raise MeaninglessError(
                    f"{name} runs {pending[name]} times in a forward pass, on inputs of {x.dim()} dimensions",
                    "shared modules and mixtures of experts cannot be scored element by element",
                )

            def backward(delta: Tensor) -> None:
                # (batch, tokens, out), (batch, tokens, in) -> (batch, out, in)
                wide = torch.promote_types(torch.float32, x.dtype)
                per_example = torch.einsum("bto,bti->boi", apart(delta.to(wide)), apart(x.to(wide)))
                sums.gradient[name] += per_example.sum(0)
                sums.square[name] += per_example.square_().sum(0)
                pending[name] = 0

            output.register_hook(backward)

        return forward

    try:
        handles.append(
            model.get_input_embeddings().register_forward_hook(lambda m, i, out: out.requires_grad_())
        )
        for name, module in weights.items():
            handles.append(module.register_forward_hook(watch(name)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def moments(
    model: PreTrainedModel,
    weights: dict[str, nn.Module],
    batches: Iterable[list[Row]],
    advance: Callable[[int], None],
    pad: int,
) -> Moments:
    """Σ g and Σ g² over the examples of all batches.

    weights: LoRA layers by parameter name. The model must be in eval mode (no dropout) and without gradient
    checkpointing, and none of its parameters may require a gradient: the graph starts at the embedded input
    instead, so autograd computes none of the weight gradients that the hooks compute per example.
    MeaninglessError if a loss is not finite.
    """
    import torch

    from stages.packing import losses

    device = next(model.parameters()).device
    zeros = {}
    for name, module in weights.items():
        wide = torch.promote_types(module.weight.dtype, torch.float32)
        zeros[name] = torch.zeros_like(module.weight, dtype=wide)
    sums = Moments(zeros, {n: z.clone() for n, z in zeros.items()}, 0, 0.0)
    for rows in batches:
        row = losses.pack_rows(model, rows, device)
        with _captured(model, weights, sums, row):
            if row is None:
                found = losses.answer_losses(model, losses.collate(rows, pad, device))
            else:
                found = losses.packed_answer_losses(model, row)
            finite = torch.isfinite(found)
            if not bool(finite.all()):
                bad = [row.id for row, ok in zip(rows, finite.tolist(), strict=True) if not ok]
                raise MeaninglessError(f"loss is not finite for {', '.join(bad)}")
            found.sum().backward()
        sums.examples += len(rows)
        sums.loss += float(found.detach().sum())
        del found  # its graph holds what every layer has seen
        advance(len(rows))
    return sums
