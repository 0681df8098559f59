"""Partition strategies: which elements are S1-only, S2-only or shared, and which of them each stage trains.

Selection is exact and independent of the machine: a float32 is an integer times a power of two, so sums are
exact integers, and the order, the threads and the device do not matter. It takes linear time: a histogram
over the high 16 bits of the scores finds the bucket in which the cut lies, and a histogram over the low 16
bits finds the cut.
"""

from __future__ import annotations

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
    """uint8: 0 none, 1 S1-only, 2 S2-only, 3 shared."""
    active: dict[str, Tensor]
    """bool: the elements that `sft` trains, and those that `rl` trains."""


def top_set(scores: Tensor, goal: Fraction, by: Literal["sum", "count"]) -> Tensor:
    """The smallest set of highest scores whose sum (or count) reaches `goal`, as a bool mask.

    scores: float32, 1-D, finite and not negative. Equal scores are taken in the order of their index. A goal
    of 0 gives the empty set; a goal above the total gives every element. For `sum`, the goal is in units of
    2^-149, like `exact_total`.
    """
    import torch

    bits = scores.view(torch.int32)  # order-preserving for floats that are not negative
    chosen = torch.zeros(len(scores), dtype=torch.bool)
    if goal <= 0:
        return chosen
    high = bits >> 16
    counts, sums = _histogram(high, bits, by)
    reached, cut = Fraction(0), -1
    for bucket in counts.nonzero().flatten().flip(0).tolist():
        if reached + sums(bucket) >= goal:
            cut = bucket
            break
        reached += sums(bucket)
    if cut < 0:
        return torch.ones_like(chosen)
    chosen |= high > cut
    inside = (high == cut).nonzero().flatten()
    low = bits[inside] & 0xFFFF
    weight = {int(v): 1 if by == "count" else _of_bits((cut << 16) + int(v)) for v in low.unique()}
    numbers = torch.bincount(low, minlength=2**16)
    for value in sorted(weight, reverse=True):
        here = inside[low == value]
        if reached + int(numbers[value]) * weight[value] >= goal:
            missing = Fraction(goal - reached)
            take = -(-missing // weight[value]) if weight[value] else len(here)
            chosen[here[: int(take)]] = True
            break
        reached += int(numbers[value]) * weight[value]
        chosen[here] = True
    return chosen


def exact_total(scores: Tensor) -> int:
    """The exact sum of float32 scores in units of 2^-149, the smallest float32."""
    import torch

    bits = scores.view(torch.int32)
    counts, sums = _histogram(bits >> 16, bits, "sum")
    return sum(sums(bucket) for bucket in counts.nonzero().flatten().tolist())


def _histogram(high: Tensor, bits: Tensor, by: str):  # type: ignore[no-untyped-def]
    """Counts per bucket, and a function from a bucket to its exact sum (or count).

    A bucket fixes the exponent, so its sum is the sum of its mantissas times a power of two. Mantissas have
    24 bits, so their sum is exact in float64 below 2^29 elements.
    """
    import torch

    counts = torch.bincount(high)
    if by == "count":
        return counts, lambda bucket: int(counts[bucket])
    mantissa = (bits & 0x7FFFFF) + torch.where(bits >= 0x800000, 0x800000, 0)
    mantissas = torch.bincount(high, weights=mantissa.double())
    return counts, lambda bucket: int(mantissas[bucket]) << max((bucket >> 7) - 1, 0)


def _of_bits(bits: int) -> int:
    exponent = bits >> 23
    return ((bits & 0x7FFFFF) + (0x800000 if exponent else 0)) << max(exponent - 1, 0)


def check(scores: Tensor, system: int) -> None:
    """MeaninglessError unless the importance of a system is finite, not negative and somewhere above zero."""
    import torch

    wrong = int((~torch.isfinite(scores)).sum())
    if wrong:
        raise MeaninglessError(f"importance of System {system} has {wrong} non-finite values")
    if bool((scores < 0).any()):
        raise MeaninglessError(f"importance of System {system} is negative somewhere")
    if not bool(scores.any()):
        raise MeaninglessError(
            f"importance of System {system} is zero for every element",
            "with B = 0 it is always zero: choose lora.init normal, pissa or olora",
        )


@strategies.add()
def importance(scores: dict[int, Tensor], section: PartitionSection, seed: int, sizes: list[int]) -> Split:
    """The paper's: per system the smallest top set that reaches θ of the importance; shared is their overlap.

    Source: arXiv 2507.20999, §3; α and β take the top ⌊α·n⌋ of the shared elements by the S1 (S2) score.
    """
    import torch

    theta = as_decimal_fraction(section.theta)
    sets = {}
    for system, values in scores.items():
        values = values + 0.0  # -0.0 would sort as the largest bit pattern
        check(values, system)
        if theta == 1:
            sets[system] = torch.ones(len(values), dtype=torch.bool)
        else:
            sets[system] = top_set(values, theta * exact_total(values), "sum")
    return _split(sets, scores, section)


@strategies.add()
def topk(scores: dict[int, Tensor], section: PartitionSection, seed: int, sizes: list[int]) -> Split:
    """As `importance`, but a system's set is the `density` of all elements with its highest scores.

    With scorer grad2 these are the sensitive elements of SPT (arXiv 2303.08566).
    """
    sets = {}
    for system, values in scores.items():
        check(values + 0.0, system)
        number = Fraction(int(as_decimal_fraction(section.density) * len(values)))
        sets[system] = top_set(values + 0.0, number, "count")
    return _split(sets, scores, section)


def _split(sets: dict[int, Tensor], scores: dict[int, Tensor], section: PartitionSection) -> Split:
    """The regions of two systems' sets, and the active elements, with α and β of those that are shared."""
    import torch

    region = sets[1].to(torch.uint8) + 2 * sets[2].to(torch.uint8)
    shared = (region == SHARED).nonzero().flatten()
    active = {}
    for stage, system, share, only in (("sft", 1, section.alpha, S1_ONLY), ("rl", 2, section.beta, S2_ONLY)):
        number = Fraction(int(as_decimal_fraction(share) * len(shared)))
        active[stage] = region == only
        active[stage][shared] = top_set((scores[system] + 0.0)[shared], number, "count")
    return Split(region, active)


@strategies.add()
def random(scores: dict[int, Tensor], section: PartitionSection, seed: int, sizes: list[int]) -> Split:
    """Control: regions and active elements of `importance`, permuted over all elements with the seed."""
    import torch

    split = importance(scores, section, seed, sizes)
    return _reordered(split, torch.randperm(len(split.region), generator=torch.Generator().manual_seed(seed)))


@strategies.add()
def random_within(scores: dict[int, Tensor], section: PartitionSection, seed: int, sizes: list[int]) -> Split:
    """Control: like `random`, but inside each LoRA weight, so every layer keeps its number of elements."""
    import torch

    split = importance(scores, section, seed, sizes)
    generator = torch.Generator().manual_seed(seed)
    starts = [0, *accumulate(sizes)]
    pieces = [at + torch.randperm(n, generator=generator) for at, n in zip(starts, sizes, strict=False)]
    return _reordered(split, torch.cat(pieces))


@strategies.add()
def swapped(scores: dict[int, Tensor], section: PartitionSection, seed: int, sizes: list[int]) -> Split:
    """Control: SFT trains System 2's elements and RL trains System 1's."""
    return importance({1: scores[2], 2: scores[1]}, section, seed, sizes)


@strategies.add()
def complement(scores: dict[int, Tensor], section: PartitionSection, seed: int, sizes: list[int]) -> Split:
    """Control: each stage trains exactly the elements that `importance` would freeze in it."""
    split = importance(scores, section, seed, sizes)
    return Split(SHARED - split.region, {stage: ~mask for stage, mask in split.active.items()})


def _reordered(split: Split, order: Tensor) -> Split:
    return Split(split.region[order], {stage: mask[order] for stage, mask in split.active.items()})


@strategies.add("unscored")
def random_half(scores: dict[int, Tensor], section: PartitionSection, seed: int, sizes: list[int]) -> Split:
    """A random `density` of all elements, half by default, is shared and trained in both stages; no scores.

    Source: LoRA-SP, arXiv 2403.08822, which freezes a random half.
    """
    import torch

    _whole(section)
    total = len(scores[1])
    order = torch.randperm(total, generator=torch.Generator().manual_seed(seed))
    chosen = torch.zeros(total, dtype=torch.bool)
    chosen[order[: int(as_decimal_fraction(section.density) * total)]] = True
    return Split(SHARED * chosen.to(torch.uint8), {"sft": chosen, "rl": chosen.clone()})


@strategies.add("unscored")
def all(scores: dict[int, Tensor], section: PartitionSection, seed: int, sizes: list[int]) -> Split:
    """Plain LoRA: every element is shared and trained in both stages; no scores are needed."""
    import torch

    _whole(section)
    every = torch.ones_like(scores[1], dtype=torch.bool)
    return Split(torch.full(every.shape, SHARED, dtype=torch.uint8), {"sft": every, "rl": every.clone()})


def _whole(section: PartitionSection) -> None:
    """ConfigError unless all shared elements are trained: without scores none of them comes first."""
    if section.alpha != 1 or section.beta != 1:
        raise ConfigError(
            f"strategy {section.strategy} trains all shared elements, got alpha {section.alpha}, "
            f"beta {section.beta}",
            "set both to 1",
        )
