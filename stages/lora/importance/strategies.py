"""Partition strategies: which elements are S1-only, S2-only or shared, and which of them each stage trains.

Selection is exact and independent of the machine. A float32 is an integer times a power of two, so sums are
computed as integers and do not depend on the order of additions, on threads or on the device. Ties are
broken by position: by parameter name, then by the flat index in the weight. Shares like θ are the decimals
that a person has typed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate
from typing import TYPE_CHECKING, Literal

from stages.config.fields import as_decimal_fraction
from stages.errors import ConfigError, MeaninglessError
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
    active: dict[str, Tensor]
    """bool: the elements that each stage, `sft` and `rl`, trains."""


def top_set(scores: Tensor, goal: Fraction, by: Literal["sum", "count"]) -> Tensor:
    """Select the smallest set of highest scores whose sum (or count) reaches `goal`, as a bool mask.

    scores: float32, 1-D, finite and not negative. Of equal scores, those of lower index come first. A goal of
    0 gives the empty set; a goal above the total gives every element. For `sum`, the goal is in units of
    2^-149, like `exact_total`.

    A float64 `cumsum` of the sorted scores would be shorter, but it rounds: where a sum is equal to the goal
    or close to it, the mask would depend on the order of the additions.
    """
    import torch

    if goal <= 0:
        return torch.zeros(len(scores), dtype=torch.bool)
    # As integers, the bit patterns of floats that are not negative are in the order of the floats; + 0.0
    # turns -0.0, whose pattern is that of a negative integer, into 0.0. Inverted, they ascend from the
    # highest score: torch has a linear radix sort for integers in ascending order.
    keys, order = (~(scores + 0.0).view(torch.int32)).sort(stable=True)
    size = math.ceil(goal) if by == "count" else _size_reaching(goal, ~keys)
    chosen = torch.zeros(len(scores), dtype=torch.bool)
    chosen[order[:size]] = True
    return chosen


def top_share(scores: Tensor, share: float) -> Tensor:
    """Select the ⌊share · n⌋ highest of n scores, as a bool mask; see `top_set`."""
    return top_set(scores, Fraction(int(as_decimal_fraction(share) * len(scores))), "count")


def _size_reaching(goal: Fraction, descending: Tensor) -> int:
    """Smallest number of leading scores whose sum reaches `goal`; all of them if none does.

    descending: bit patterns of the scores, highest first, (elements,).

    Scores of one exponent k form a block of integers s_i times 2^k, and the s_i of fewer than 2^39 elements
    have an exact sum in int64. The sums of the blocks are subtracted from the goal, in Python's integers,
    until one reaches what is left of it. In that block, the sum of the first n scores reaches the goal if and
    only if s_1 + … + s_n ≥ ⌈goal / 2^k⌉.
    """
    import torch

    significands, exponents = _as_integers(descending)
    values, sizes = exponents.unique_consecutive(return_counts=True)  # (blocks,) each, at most 254
    passed = 0
    for exponent, block in zip(values.tolist(), significands.split(sizes.tolist()), strict=True):
        total = int(block.sum()) << exponent
        if total >= goal:
            needed = math.ceil(goal / Fraction(2**exponent))
            return passed + int(torch.searchsorted(block.cumsum(0), needed)) + 1
        goal -= total
        passed += len(block)
    return passed


def exact_total(scores: Tensor) -> int:
    """The exact sum of float32 scores in units of 2^-149, the smallest float32."""
    import torch

    significands, exponents = _as_integers((scores + 0.0).view(torch.int32))  # + 0.0: see `top_set`
    # One int64 sum for each exponent, then Σ_k sum_k · 2^k in Python's integers.
    sums = torch.zeros(254, dtype=torch.int64).index_add_(0, exponents, significands.long())
    return sum(total << exponent for exponent, total in enumerate(sums.tolist()))


def _as_integers(bits: Tensor) -> tuple[Tensor, Tensor]:
    """Split floats into integers s < 2^24 and k ≤ 253 with float = s · 2^k in units of 2^-149, exactly.

    bits: int32 bit patterns of finite float32 that are not negative: 8 bits of exponent e, then 23 bits of
    fraction f. Normal numbers (e > 0) are (2^23 + f) · 2^(e − 1), subnormal ones (e = 0) are f · 2^0.
    """
    import torch

    exponents, fractions = bits >> 23, bits & 0x7FFFFF
    significands = torch.where(exponents > 0, fractions | 0x800000, fractions)  # int32
    return significands, (exponents - 1).clamp(min=0)


def check_importance(scores: Tensor, rows: int | str) -> None:
    """MeaninglessError unless scores are finite, not negative and not all zero.

    rows: what they are the scores of, a system or a title.
    """
    import torch

    title = rows if isinstance(rows, str) else f"System {rows}"
    non_finite = int((~torch.isfinite(scores)).sum())
    if non_finite:
        raise MeaninglessError(f"importance of {title} has {non_finite} non-finite values")
    if bool((scores < 0).any()):
        raise MeaninglessError(f"importance of {title} has negative values")
    if not bool(scores.any()):
        raise MeaninglessError(
            f"importance of {title} is zero for every element",
            "with B = 0 it is always zero: choose lora.init normal, pissa, olora or orthogonal",
        )


def needed_set(scores: Tensor, theta: float, rows: int | str) -> Tensor:
    """The smallest top set that reaches θ of the importance, as a bool mask; with θ = 1 every element.

    rows: what the scores are of, for the errors of `check_importance`.
    """
    import torch

    check_importance(scores, rows)
    if theta == 1:
        return torch.ones(len(scores), dtype=torch.bool)
    return top_set(scores, as_decimal_fraction(theta) * exact_total(scores), "sum")


@strategies.add()
def importance(scores: dict[int, Tensor], section: PartitionSection, seed: int, sizes: list[int]) -> Split:
    """The paper's: each system's smallest top set that reaches θ of its importance; shared is their overlap.

    Source: arXiv 2507.20999, §3; α and β take the top ⌊α·n⌋ of the shared elements by the S1 (S2) score.
    """
    sets = {system: needed_set(values, section.theta, system) for system, values in scores.items()}
    return _split(sets, scores, section)


@strategies.add()
def topk(scores: dict[int, Tensor], section: PartitionSection, seed: int, sizes: list[int]) -> Split:
    """As `importance`, but a system's set is the `density` of all elements with its highest scores.

    With scorer grad2 these are the sensitive elements of SPT (arXiv 2303.08566).
    """
    sets = {}
    for system, values in scores.items():
        check_importance(values, system)
        sets[system] = top_share(values, section.density)
    return _split(sets, scores, section)


@strategies.add()
def topk_within(scores: dict[int, Tensor], section: PartitionSection, seed: int, sizes: list[int]) -> Split:
    """As `topk`, but the `density` of each LoRA weight: no weight gets more elements than its share.

    Beside `topk` it tells whether it matters how many elements a weight has, or which they are.
    """
    import torch

    sets = {}
    for system, values in scores.items():
        check_importance(values, system)
        sets[system] = torch.cat([top_share(weight, section.density) for weight in values.split(sizes)])
    return _split(sets, scores, section)


def _split(sets: dict[int, Tensor], scores: dict[int, Tensor], section: PartitionSection) -> Split:
    """Form the regions from each system's set, and choose the active elements of both stages.

    A stage trains its system's own elements, and of the shared ones those with that system's highest scores:
    ⌊α·n⌋ of n in SFT, ⌊β·n⌋ in RL.
    """
    import torch

    region = sets[1].to(torch.uint8) + 2 * sets[2].to(torch.uint8)  # (elements,)
    shared = (region == SHARED).nonzero().flatten()  # (n,): indices of the shared elements
    active = {}
    for stage, system, share, only in (("sft", 1, section.alpha, S1_ONLY), ("rl", 2, section.beta, S2_ONLY)):
        active[stage] = region == only
        active[stage][shared] = top_share(scores[system][shared], share)
    return Split(region, active)


@strategies.add()
def random(scores: dict[int, Tensor], section: PartitionSection, seed: int, sizes: list[int]) -> Split:
    """Control: regions and active elements of `importance`, permuted over all elements with the seed."""
    import torch

    split = importance(scores, section, seed, sizes)
    return _permuted(split, torch.randperm(len(split.region), generator=torch.Generator().manual_seed(seed)))


@strategies.add()
def random_within(scores: dict[int, Tensor], section: PartitionSection, seed: int, sizes: list[int]) -> Split:
    """Control: like `random`, but inside each LoRA weight, so every layer keeps its number of elements."""
    return _permuted(importance(scores, section, seed, sizes), order_within(sizes, seed))


def order_within(sizes: list[int], seed: int) -> Tensor:
    """A random order of all elements in which each stays in its weight, (elements,)."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    starts = [0, *accumulate(sizes)]  # one more than there are weights: the last is the end
    pieces = [start + torch.randperm(n, generator=generator) for start, n in zip(starts, sizes, strict=False)]
    return torch.cat(pieces)


@strategies.add()
def swapped(scores: dict[int, Tensor], section: PartitionSection, seed: int, sizes: list[int]) -> Split:
    """Control: SFT trains System 2's elements and RL trains System 1's."""
    return importance({1: scores[2], 2: scores[1]}, section, seed, sizes)


@strategies.add()
def complement(scores: dict[int, Tensor], section: PartitionSection, seed: int, sizes: list[int]) -> Split:
    """Control: each stage trains exactly the elements that `importance` would freeze in it."""
    split = importance(scores, section, seed, sizes)
    # SHARED has both bits, so the difference inverts membership in each system's set.
    return Split(SHARED - split.region, {stage: ~mask for stage, mask in split.active.items()})


def _permuted(split: Split, order: Tensor) -> Split:
    """Give element i the region and activity of element order[i]."""
    return Split(split.region[order], {stage: mask[order] for stage, mask in split.active.items()})


@strategies.add("unscored")
def random_half(scores: dict[int, Tensor], section: PartitionSection, seed: int, sizes: list[int]) -> Split:
    """A random `density` of all elements, half by default, is shared and trained in both stages; no scores.

    Source: LoRA-SP, arXiv 2403.08822, which freezes a random half.
    """
    import torch

    _require_all_shared(section)
    total = len(scores[1])
    order = torch.randperm(total, generator=torch.Generator().manual_seed(seed))
    chosen = torch.zeros(total, dtype=torch.bool)
    chosen[order[: int(as_decimal_fraction(section.density) * total)]] = True
    return Split(SHARED * chosen.to(torch.uint8), {"sft": chosen, "rl": chosen.clone()})


@strategies.add("unscored")
def all(scores: dict[int, Tensor], section: PartitionSection, seed: int, sizes: list[int]) -> Split:
    """Plain LoRA: every element is shared and trained in both stages; no scores are needed."""
    import torch

    _require_all_shared(section)
    chosen = torch.ones_like(scores[1], dtype=torch.bool)
    return Split(torch.full(chosen.shape, SHARED, dtype=torch.uint8), {"sft": chosen, "rl": chosen.clone()})


def _require_all_shared(section: PartitionSection) -> None:
    """ConfigError unless alpha and beta are 1: without scores there are no top shared elements to choose."""
    if section.alpha != 1 or section.beta != 1:
        raise ConfigError(
            f"strategy {section.strategy} trains all shared elements, got alpha {section.alpha}, "
            f"beta {section.beta}",
            "set both to 1",
        )
