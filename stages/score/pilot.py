"""Pilot run: a few LoRA training steps on one system's examples, to measure how far each element moves."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

import torch
from torch import Tensor, nn

from stages.config import LoraSection
from stages.lora.adapter import adapter
from stages.lora.importance.scorers import Moments

Batch = TypeVar("Batch")

STEPS = 12
"""Optimizer steps; the examples are divided among them.

The first step of AdamW moves every element by the learning rate, whatever its gradient, so one step would
not tell elements apart.
"""
LR = 2e-4
"""Learning rate: the default of SFT. AdamW's steps scale with it; it hardly changes the ranking."""


def run(
    layers: dict[str, nn.Linear],
    lora: LoraSection,
    batches: Iterable[Batch],
    gradients: Callable[[Batch], Moments],
) -> tuple[dict[str, Tensor], float]:
    """Take one AdamW step per batch and return the resulting weights and the sum of the examples' losses.

    layers: LoRA layers by parameter name; their weights are restored at the end. gradients: the sums of a
    batch's gradients and losses at the current weights. All elements of the trainable parts are trained, at a
    constant learning rate and without weight decay. Each loss is that before the step of its batch.
    """
    initial = {name: layer.weight.detach().clone() for name, layer in layers.items()}
    optimizer = torch.optim.AdamW([layer.weight for layer in layers.values()], lr=LR, weight_decay=0)
    loss = 0.0
    for batch in batches:
        sums = gradients(batch)
        loss += sums.loss
        for name, layer in layers.items():
            # Zeros in the frozen half of a compensated adapter: AdamW without weight decay leaves it alone.
            gradient = torch.zeros_like(layer.weight)
            mean = adapter.trainable_part(name, sums.gradient[name] / sums.examples, lora)
            adapter.trainable_part(name, gradient, lora).copy_(mean)
            layer.weight.grad = gradient
        optimizer.step()
    trained = {name: layer.weight.detach().clone() for name, layer in layers.items()}
    with torch.no_grad():
        for name, layer in layers.items():
            layer.weight.copy_(initial[name])
            layer.weight.grad = None
    return trained, loss
