"""Partition strategies: which elements are S1-only, S2-only or shared, and which each stage may train.

`stages/partition/run.py` takes away those that protected rows need, and writes the masks of what is trained.
Selection is exact and independent of the machine. A float32 is an integer times a power of two, so sums are
computed as integers and do not depend on the order of additions, on threads or on the device. Ties are
broken by position: by parameter name, then by the flat index in the weight. Shares like θ are the decimals
that a person has typed.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

from stages.config.fields import as_decimal_fraction
from stages.errors import UnusableResult
from stages.registry import Registry

if TYPE_CHECKING:
    from torch import Tensor

    from stages.config import PartitionSection

NONE, S1_ONLY, S2_ONLY, SHARED = 0, 1, 2, 3

strategies: Registry = Registry("strategy")
"""Trait `unscored`: the strategy needs no importance."""


@dataclass(frozen=True)
class Split:
    """Region and activity of each element; every mask is 1-D over the concatenated LoRA weights."""

    region: Tensor
    """uint8: 0 none, 1 S1-only, 2 S2-only, 3 shared: bit 0 is System 1's set, bit 1 System 2's."""
    active: dict[int, Tensor]
    """bool: the elements that train for each system: for 1 in SFT, for 2 in RL."""


def top_share(scores: Tensor, share: float) -> Tensor:
    """Select the ⌊share · n⌋ highest of n scores, as a bool mask; see `_descending`."""
    size = int(as_decimal_fraction(share) * len(scores))
    return _chosen(_descending(scores)[:size], len(scores))


def _chosen(indices: Tensor | slice, elements: int) -> Tensor:
    """bool: True at these indices, (elements,)."""
    import torch

    chosen = torch.zeros(elements, dtype=torch.bool)
    chosen[indices] = True
    return chosen


def _descending(scores: Tensor) -> Tensor:
    """Indices of the scores from the highest to the lowest; of equal ones, the lower index comes first.

    scores: float32, 1-D, finite and not negative.
    """
    import torch

    # As integers, the bit patterns of floats that are not negative are in the order of the floats; + 0.0
    # turns -0.0, whose pattern is that of a negative integer, into 0.0. Inverted, they ascend from the
    # highest score: torch has a linear radix sort for integers in ascending order.
    return (~(scores + 0.0).view(torch.int32)).argsort(stable=True)


def _size_reaching(theta: float, descending: Tensor) -> int:
    """Smallest number of leading scores whose sum reaches θ of the sum of all.

    A float64 sum, which is rounded, tells about where that is, and exact sums of a few beginnings tell where:
    θ = 0.5 of 1, 1 and 2^-149 needs the second 1, and with rounded sums it would not.
    """
    import torch

    goal = math.ceil(as_decimal_fraction(theta) * exact_total(descending))
    sums = descending.double().cumsum(0)  # of relative error below 1e-7 for 2^29 elements
    bounds = sums[-1] * theta * torch.tensor([1 - 1e-6, 1 + 1e-6], dtype=torch.double)
    first, last = torch.searchsorted(sums, bounds).tolist()
    sizes = range(min(last + 1, len(descending)))
    return bisect_left(sizes, goal, lo=first, key=lambda size: exact_total(descending[:size]))


def exact_total(scores: Tensor) -> int:
    """The exact sum of float32 scores in units of 2^-173."""
    import torch

    # A score is m · 2^k with k ≥ -148, the exponent of the smallest float32, and m · 2^24 is an integer. One
    # int64 sum for each k is exact for fewer than 2^39 elements, and Python's integers add these.
    mantissas, exponents = torch.frexp(scores)
    sums = torch.zeros(278, dtype=torch.int64).index_add_(0, exponents + 149, (mantissas * 2**24).long())
    return sum(total << exponent for exponent, total in enumerate(sums.tolist()))


def check_importance(scores: Tensor, title: str) -> None:
    """UnusableResult unless scores are finite, not negative and not all zero. title: what they are of."""
    non_finite = int((~scores.isfinite()).sum())
    if non_finite:
        raise UnusableResult(f"importance of {title} has {non_finite} non-finite values")
    if bool((scores < 0).any()):
        raise UnusableResult(f"importance of {title} has negative values", "a scorer gives none below 0")
    if not bool(scores.any()):
        raise UnusableResult(
            f"importance of {title} is zero for every element",
            "with B = 0 it is always zero: choose lora.init normal, pissa or olora",
        )


def needed_set(scores: Tensor, theta: float, title: str) -> Tensor:
    """The smallest top set that reaches θ of the importance, as a bool mask; with θ = 1 every element.

    title: what the scores are of, for the errors of `check_importance`.
    """
    check_importance(scores, title)
    if theta == 1:
        return _chosen(slice(None), len(scores))
    order = _descending(scores)
    return _chosen(order[: _size_reaching(theta, scores[order])], len(scores))


@strategies.add()
def importance(scores: dict[int, Tensor], section: PartitionSection, seed: int, sizes: list[int]) -> Split:
    """The paper's: each system's smallest top set that reaches θ of its importance; shared is their overlap.

    Source: arXiv 2507.20999, §3; α and β take the top ⌊α·n⌋ of the shared elements by the S1 (S2) score.
    """
    sets = {
        system: needed_set(values, section.theta, f"System {system}") for system, values in scores.items()
    }
    return _split(sets, scores, section)


@strategies.add()
def topk(scores: dict[int, Tensor], section: PartitionSection, seed: int, sizes: list[int]) -> Split:
    """As `importance`, but a system's set is the `density` of all elements with its highest scores.

    With scorer grad2 these are the sensitive elements of SPT (arXiv 2303.08566).
    """
    for system, values in scores.items():
        check_importance(values, f"System {system}")
    sets = {system: top_share(values, section.density) for system, values in scores.items()}
    return _split(sets, scores, section)


def _split(sets: dict[int, Tensor], scores: dict[int, Tensor], section: PartitionSection) -> Split:
    """Form the regions from each system's set, and choose the active elements of both stages.

    A stage trains its system's own elements, and of the shared ones those with that system's highest scores:
    ⌊α·n⌋ of n in SFT, ⌊β·n⌋ in RL.
    """
    region = sets[1].byte() + 2 * sets[2].byte()  # uint8, (elements,)
    shared = (region == SHARED).nonzero().flatten()  # (n,): indices of the shared elements
    active = {}
    for system, share, only in ((1, section.alpha, S1_ONLY), (2, section.beta, S2_ONLY)):
        active[system] = region == only
        active[system][shared] = top_share(scores[system][shared], share)
    return Split(region, active)


@strategies.add(name="random")
def permuted(scores: dict[int, Tensor], section: PartitionSection, seed: int, sizes: list[int]) -> Split:
    """Control: regions and active elements of `importance`, permuted over all elements with the seed."""
    return random_within(scores, section, seed, [sum(sizes)])


@strategies.add()
def random_within(scores: dict[int, Tensor], section: PartitionSection, seed: int, sizes: list[int]) -> Split:
    """Control: like `random`, but inside each LoRA weight, so every layer keeps its number of elements."""
    split, order = importance(scores, section, seed, sizes), order_within(sizes, seed)
    return Split(split.region[order], {system: mask[order] for system, mask in split.active.items()})


def order_within(sizes: list[int], seed: int) -> Tensor:
    """A random order of all elements in which each stays in its weight, (elements,)."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    starts = [0, *accumulate(sizes)]  # one more than there are weights: the last is the end
    pieces = [start + torch.randperm(n, generator=generator) for start, n in zip(starts, sizes, strict=False)]
    return torch.cat(pieces)


@strategies.add("unscored")
def random_half(scores: dict[int, Tensor], section: PartitionSection, seed: int, sizes: list[int]) -> Split:
    """A random `density` of all elements, half by default, is shared and trained in both stages; no scores.

    Source: LoRA-SP, arXiv 2403.08822, which freezes a random half.
    """
    elements = sum(sizes)
    size = int(as_decimal_fraction(section.density) * elements)
    return _same_in_both_stages(_chosen(order_within([elements], seed)[:size], elements))


@strategies.add("unscored", name="all")
def every_element(scores: dict[int, Tensor], section: PartitionSection, seed: int, sizes: list[int]) -> Split:
    """Plain LoRA: every element is shared and trained in both stages; no scores are needed."""
    return _same_in_both_stages(_chosen(slice(None), sum(sizes)))


def _same_in_both_stages(chosen: Tensor) -> Split:
    return Split(SHARED * chosen.byte(), {1: chosen, 2: chosen.clone()})
