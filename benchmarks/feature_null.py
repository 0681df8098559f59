"""How concentrated importance is beside numbers that are random within each feature, as Markdown.

    python benchmarks/feature_null.py runs/RUN/score/latest/importance.safetensors

A feature is a column of A or a row of B, which holds one element for each rank. The null has a scale for each
feature, and within it products |g·φ| of independent Gaussians. Unlike `gaussian_null`, whose scale is one for
a whole weight, it leaves no room for differences between features, so what is left is chance within them.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
from torch import Tensor

from stages.lora.importance.masks import read_importance

SHARES = (0.1, 0.3, 0.5, 0.7, 0.9)
PRODUCT_VARIANCE = math.pi**2 / 4 - 1
"""Variance of |g·φ| of standard Gaussians over its squared mean: E(g·φ)² = 1, and E|g·φ| = 2/π."""


def feature_scales(scores: Tensor) -> Tensor:
    """Estimate the scale of each feature from scores, (features, ranks): (features, 1).

    The mean of a feature's scores varies by chance, too, by PRODUCT_VARIANCE / ranks of its squared scale. So
    the means are drawn together around their own mean until the variance is that of the scales alone.
    """
    means = scores.mean(1, keepdim=True)
    center, variance = means.mean(), means.var(correction=0)
    by_chance = PRODUCT_VARIANCE / scores.shape[1]
    # mean = scale · x with E x = 1 and Var x = by_chance, so E mean² = E scale² · (1 + by_chance).
    of_scales = (center.square() + variance) / (1 + by_chance) - center.square()
    return center + (of_scales.clamp(min=0) / variance.clamp(min=1e-300)).sqrt() * (means - center)


def draw(scores: Tensor, generator: torch.Generator) -> Tensor:
    """Draw the null of a weight's scores, (features, ranks)."""
    gradient, value = torch.randn(2, *scores.shape, generator=generator, dtype=scores.dtype)
    return (gradient * value).abs() * feature_scales(scores) * (math.pi / 2)  # E|g·φ| is 2/π


def needed(scores: Tensor) -> list[float]:
    """The smallest percentage of elements that holds each of SHARES of the importance."""
    cumulative = scores.sort(descending=True).values.cumsum(0)
    reached = torch.searchsorted(cumulative, cumulative[-1] * torch.tensor(SHARES, dtype=cumulative.dtype))
    return (100 * (reached + 1) / len(scores)).tolist()


def table(importance: dict[int, dict[str, Tensor]]) -> str:
    """A row for the scores of each system, and one for their null."""
    generator = torch.Generator().manual_seed(0)
    rows = [["share of the importance", *map(str, SHARES)], ["---"] * (1 + len(SHARES))]
    for system, weights in importance.items():
        # A is (ranks, in) and B is (out, ranks).
        by_feature = [w.double().T if ".lora_A." in name else w.double() for name, w in weights.items()]
        null = [draw(scores, generator) for scores in by_feature]
        for title, parts in ((f"System {system}, %", by_feature), ("random within each feature, %", null)):
            values = needed(torch.cat([part.flatten() for part in parts]))
            rows.append([title, *(f"{value:.2f}" for value in values)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("importance", type=Path, help="importance.safetensors of an artifact of `score`")
    print(table(read_importance(parser.parse_args().importance)))
