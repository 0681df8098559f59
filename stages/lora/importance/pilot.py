"""A pilot run: a few steps of LoRA on one system's examples, to see which elements it moves."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, TypeVar

from stages.lora.adapter import adapter

if TYPE_CHECKING:
    from torch import Tensor, nn

    from stages.config import LoraSection
    from stages.lora.importance.scorers import Moments

Batch = TypeVar("Batch")

STEPS = 12
"""The examples are divided among them. One step alone would move every element by the same rate."""
LR = 2e-4
"""The default of both trainings. AdamW's steps scale with it: the order of elements hardly depends on it."""


def trained(
    weights: dict[str, nn.Linear],
    lora: LoraSection,
    batches: Iterable[Batch],
    gradients: Callable[[Batch], Moments],
) -> tuple[dict[str, Tensor], float]:
    """The weights after one AdamW step for each batch, and the sum of the losses that the steps began with.

    All elements of the trainable parts are trained, at a constant rate and without weight decay. The layers
    themselves are left as they were.
    """
    import torch

    before = {name: layer.weight.detach().clone() for name, layer in weights.items()}
    optimizer = torch.optim.AdamW([layer.weight for layer in weights.values()], lr=LR, weight_decay=0)
    loss = 0.0
    for batch in batches:
        sums = gradients(batch)
        loss += sums.loss
        for name, layer in weights.items():
            whole = torch.zeros_like(layer.weight)
            mean = adapter.trainable_part(name, sums.gradient[name] / sums.examples, lora)
            adapter.trainable_part(name, whole, lora).copy_(mean)
            layer.weight.grad = whole
        optimizer.step()
    after = {name: layer.weight.detach().clone() for name, layer in weights.items()}
    with torch.no_grad():
        for name, layer in weights.items():
            layer.weight.copy_(before[name])
            layer.weight.grad = None
    return after, loss
