"""How concentrated importance is beside numbers that are random within each feature, as Markdown.

    python benchmarks/feature_null.py runs/RUN/score/latest/importance.safetensors

A feature is a column of A or a row of B, which holds one element for each rank. The null by feature of the
report's pages leaves room for differences between features alone, so what is left is chance within them.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor

from stages.lora.importance.masks import flatten_weights, read_importance
from stages.report.elements import gaussian_null

SHARES = (0.1, 0.3, 0.5, 0.7, 0.9)


def needed(scores: Tensor) -> list[float]:
    """The smallest percentage of elements that holds each of SHARES of the importance."""
    cumulative = scores.double().sort(descending=True).values.cumsum(0)
    reached = torch.searchsorted(cumulative, cumulative[-1] * torch.tensor(SHARES, dtype=cumulative.dtype))
    return (100 * (reached + 1) / len(scores)).tolist()


def table(importance: dict[int, dict[str, Tensor]]) -> str:
    """A row for the scores of each system, and one for their null."""
    nulls = gaussian_null(importance, by_feature=True)
    rows = [["share of the importance", *map(str, SHARES)], ["---"] * (1 + len(SHARES))]
    for system, weights in importance.items():
        measured = (f"System {system}, %", flatten_weights(weights))
        for title, scores in (measured, ("random within each feature, %", nulls[system])):
            rows.append([title, *(f"{value:.2f}" for value in needed(scores))])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("importance", type=Path, help="importance.safetensors of an artifact of `score`")
    print(table(read_importance(parser.parse_args().importance)))
