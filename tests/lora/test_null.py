"""The nulls of importance: products of independent Gaussians, with the mean of each weight or feature."""

import torch


def _share(scores: torch.Tensor, theta: float) -> float:
    """Share of the elements that hold `theta` of the sum."""
    ordered = scores.double().sort(descending=True).values.cumsum(0)
    return float((ordered < theta * ordered[-1]).sum() + 1) / len(ordered)
