"""The elements on a page: the size of each region, and the importance for both systems."""

from collections.abc import Iterator
from itertools import combinations

import torch
from torch import Tensor

from stages.lora.importance.masks import Masks, flatten_weights, read_importance
from stages.lora.importance.strategies import S1_ONLY, S2_ONLY, SHARED
from stages.report import figures
from stages.report.page import Block, Grid, Picture
from stages.store.artifacts import Artifact

DOTS = 2000
"""Most elements of each region in the scatter plot of both systems' importance."""
REGIONS = {
    "s1_only": ("System 1 only", S1_ONLY), "s2_only": ("System 2 only", S2_ONLY),
    "shared": ("shared by both", SHARED),
}  # fmt: skip
"""Name of a region in a summary → its title, and its code in the masks."""


def parts(artifacts: dict[str, Artifact]) -> Iterator[Block]:
    """Build the blocks of SFT's elements."""
    score, masks = artifacts.get("score"), artifacts.get("partition:sft")
    if masks is None:
        return
    summary, total = masks.manifest["summary"], masks.manifest["summary"]["elements"]
    titles = {**{name: title for name, (title, _) in REGIONS.items()}, "none": "of neither"}
    rows = [[t, f"{summary[name]:,}", f"{100 * summary[name] / total:.1f} %"] for name, t in titles.items()]
    yield Grid(["region", "elements", "share"], rows, f"Of {total:,} LoRA elements.")
    if score is not None and (score.path / "importance.safetensors").is_file():
        yield importance_by_system(score, masks, "")


def importance_by_system(score: Artifact, masks: Artifact, title: str) -> Picture:
    """Plot importance for System 1 against that for System 2, for a sample of the elements of each region.

    Both are divided by their L2 norm, as in the figure of arXiv 2507.20999. title: where a page has several.
    """
    importance = read_importance(score.path / "importance.safetensors")
    scores = [flatten_weights(importance[system]).double() for system in (1, 2)]
    first, second = (values / values.norm().clamp(min=1e-300) for values in scores)
    region = flatten_weights(Masks.load(masks.path, masks.manifest["variant"]).region)
    positive = (first > 0) & (second > 0)  # the axes are logarithmic
    groups = {}
    for name, code in REGIONS.values():
        indices = ((region == code) & positive).nonzero().flatten()
        # At most DOTS of them, evenly spaced in the order of the elements.
        indices = indices[torch.linspace(0, max(0, len(indices) - 1), min(DOTS, len(indices))).long()]
        groups[name] = (first[indices].tolist(), second[indices].tolist())
    summary = masks.manifest["summary"]
    text = (
        f"{100 * summary['s1_only_share']:.1f} % of System 1's set belongs to it alone, "
        f"{100 * summary['s2_only_share']:.1f} % of System 2's; Jaccard index {summary['jaccard']:.3f}."
    )
    text = f"{title}: {text}" if title else text
    svg = figures.svg(figures.scatter(groups, title or "importance by system"))
    return Picture(svg, f"Importance by system. {text}", text)


def between_seeds(masks: list[Artifact]) -> str:
    """Say how much of System 1's set returns with another seed: Jaccard indices, in the mean of all pairs."""
    regions = [Masks.load(each.path, each.manifest["variant"]).region for each in masks]
    overlaps = torch.stack([_overlaps(*pair) for pair in combinations(regions, 2)])
    observed, by_weight, by_chance = overlaps.mean(0).tolist()
    return (
        f"System 1's sets of {len(masks)} seeds have a Jaccard index of {observed:.3f}. Random sets with as "
        f"many elements of each weight would have {by_weight:.3f}, other random sets {by_chance:.3f}."
    )


def _overlaps(first: dict[str, Tensor], second: dict[str, Tensor]) -> Tensor:
    """Jaccard index of System 1's sets in two region masks, then what random sets of their sizes would have.

    Two random subsets of n elements share, in expectation, the product of their sizes divided by n: here in
    each weight, then over all.
    """
    pairs = [(first[name] & 1, second[name] & 1) for name in first]  # bit 0 is System 1's set
    of_weights = torch.tensor([[a.numel(), a.sum(), b.sum(), (a & b).sum()] for a, b in pairs]).double()
    elements, a, b, both = of_weights.T
    shared = torch.stack([both.sum(), (a * b / elements).sum(), a.sum() * b.sum() / elements.sum()])
    return shared / (a.sum() + b.sum() - shared)
