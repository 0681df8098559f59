"""The null of importance: its distribution if gradients and values of elements were independent noise."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from stages.lora.importance.strategies import needed_set

SAMPLE = 2**21
"""Most elements that are drawn; every weight is represented by its share of them."""


def gaussian_null(importance: dict[int, dict[str, Tensor]]) -> dict[int, Tensor]:
    """Draw |g·φ| with independent Gaussian g and φ for each element, scaled to its weight's mean importance.

    Such products are concentrated by themselves: small for most elements, large for a few. Only what goes
    beyond this null says something about the model. importance: system → parameter name → scores. Each system
    has its own g; φ is shared, as the systems score the same values. Returns (elements,) for each system, or
    a sample of at most about SAMPLE elements of a larger model. The seed is fixed: repeated calls agree.
    """
    generator = torch.Generator().manual_seed(0)
    weights = next(iter(importance.values()))
    share = min(1.0, SAMPLE / sum(weight.numel() for weight in weights.values()))
    draws: dict[int, list[Tensor]] = {system: [] for system in importance}
    for name in sorted(weights):
        size = math.ceil(weights[name].numel() * share)
        value, *gradients = torch.randn(1 + len(importance), size, generator=generator)
        for (system, scores), gradient in zip(importance.items(), gradients, strict=True):
            # For standard normals E|g·φ| = E|g| · E|φ| = √(2/π)² = 2/π, so π/2 scales the mean to 1.
            draws[system].append((gradient * value).abs() * (scores[name].double().mean() * math.pi / 2))
    return {system: torch.cat(products).float() for system, products in draws.items()}


def null_jaccard(importance: dict[int, dict[str, Tensor]], theta: float) -> float:
    """Compute the Jaccard index of both systems' sets at θ under the null."""
    first, second = (needed_set(draw, theta, "the null") for draw in gaussian_null(importance).values())
    return int((first & second).sum()) / int((first | second).sum())
