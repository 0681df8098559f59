"""The null of importance: its distribution if gradients and values of elements were independent noise."""

from __future__ import annotations

import math

import torch
from torch import Tensor

SAMPLE = 2**21
"""Most elements that are drawn; every weight is represented by its share of them."""


def gaussian_null(importance: dict[str, Tensor]) -> Tensor:
    """Draw |g·φ| of independent Gaussians for each element, scaled to the mean importance of its weight.

    A product of two random numbers is small for most elements and large for few. So part of what is seen when
    importance is concentrated is seen here, too. Always the same draw; 1-D, over a sample of large models.
    """
    generator = torch.Generator().manual_seed(0)
    share = min(1.0, SAMPLE / sum(weight.numel() for weight in importance.values()))
    draws = []
    for name in sorted(importance):
        weight = importance[name]
        size = math.ceil(weight.numel() * share)
        gradient, value = torch.randn(2, size, generator=generator)
        # E|g·φ| = (E|g|)² = 2/π
        draws.append((gradient * value).abs() * (weight.double().mean() * math.pi / 2))
    return torch.cat(draws).float()
