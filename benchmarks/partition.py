"""Exact selection against a stable sort of the same scores, side by side in one process.

Prints times and the ratio.

python benchmarks/partition.py [ELEMENTS]
"""

import sys
import time

import torch

from stages.lora.importance.strategies import needed_set

REPEATS = 5


def sorted_set(scores: torch.Tensor, theta: float) -> torch.Tensor:
    """What a float sort and cumulative sum give: not exact, for comparison of time only."""
    values, order = torch.sort(scores, descending=True, stable=True)
    cut = int((values.double().cumsum(0) < theta * values.double().sum()).sum()) + 1
    chosen = torch.zeros(len(scores), dtype=torch.bool)
    chosen[order[:cut]] = True
    return chosen


def main(elements: int) -> None:
    scores = torch.randn(elements, generator=torch.Generator().manual_seed(0)).pow(4)
    exact, plain = [], []
    for _ in range(REPEATS):
        begun = time.perf_counter()
        mine = needed_set(scores, 0.9, "random scores")
        exact.append(time.perf_counter() - begun)
        begun = time.perf_counter()
        theirs = sorted_set(scores, 0.9)
        plain.append(time.perf_counter() - begun)
    differ = int((mine != theirs).sum())
    print(f"{elements} elements, one system: exact {min(exact):.3f} s, sort {min(plain):.3f} s, ", end="")
    print(f"ratio {min(exact) / min(plain):.2f}, {differ} elements differ")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 2_165_760)
