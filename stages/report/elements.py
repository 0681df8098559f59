"""The elements on a page: how the importance is spread over them, and in which layers each region lies."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from stages.config import Config
from stages.lora.importance.masks import Masks, flatten_weights, read_importance
from stages.lora.importance.scorers import rescored_by_rollouts, scorers
from stages.lora.importance.strategies import S1_ONLY, S2_ONLY, SHARED, needed_set
from stages.report import figures
from stages.report.page import Block, Grid, Picture, Pictures, Text
from stages.store.artifacts import Artifact

POINTS = 200
"""Points of a cumulative curve."""
SAMPLE = 2**21
"""Most elements that are drawn; every weight is represented by its share of them."""
DOTS = 2000
"""Most elements of each region in the scatter plot of both systems' importance."""
REGION_TITLES = {
    "s1_only": "System 1 only", "s2_only": "System 2 only", "shared": "shared by both", "none": "of neither"
}  # fmt: skip
"""Name of a region in a summary → its title."""
BY_WEIGHT, BY_FEATURE = "Gaussians by weight", "Gaussians by feature"
"""Names of what chance gives for the importance of elements, see `gaussian_null`."""
CODES = {"s1_only": S1_ONLY, "s2_only": S2_ONLY, "shared": SHARED}
"""Name of a region that a system needs → its code in the masks."""


def parts(config: Config, artifacts: dict[str, Artifact]) -> Iterator[Block]:
    """Build the blocks of SFT's elements, and those of RL's if they were scored again.

    The maps are of SFT's alone: more than three are not compared by eye.
    """
    masks = artifacts.get("partition:sft")
    yield from _stage(config, artifacts.get("score"), masks, "")
    if masks is not None:
        yield from _maps(masks)
    if "score:rl" in artifacts:
        yield Text(f"For RL the elements were scored again, by {config.rl.rescore} at the adapter of SFT.")
        yield from _stage(config, artifacts["score:rl"], artifacts.get("partition:rl"), "for RL")


def _stage(config: Config, score: Artifact | None, masks: Artifact | None, title: str) -> Iterator[Block]:
    """Build the blocks of one training stage. title: of the scatter plot, where a page has several."""
    if masks is not None:
        summary = masks.manifest["summary"]
        total = summary["elements"]
        rows = [
            [region, f"{summary[name]:,}", f"{100 * summary[name] / total:.1f} %"]
            for name, region in REGION_TITLES.items()
            if name in summary
        ]
        yield Grid(["region", "elements", "share"], rows, f"Of {total:,} LoRA elements.")
    if score is not None and (score.path / "importance.safetensors").is_file():
        pictures = [cumulative_importance(config, score)]
        if masks is not None:
            pictures.append(importance_by_system(config, score, masks, title))
        yield Pictures(pictures)


def _products(config: Config, score: Artifact) -> dict[int, dict[str, Tensor]]:
    """Read the scores of the systems whose scorer multiplies gradient and value; only these have a null."""
    rescorer = config.rl.rescore if score.manifest["variant"] == "rl" else None
    second = rescorer or config.score.scorer
    # RL's own gradients score System 2 alone.
    first = config.score.scorer if rescorer and rescored_by_rollouts(config) else second
    scores = read_importance(score.path / "importance.safetensors")
    names = {1: first, 2: second}
    return {system: scores[system] for system, name in names.items() if scorers.has_trait(name, "product")}


def cumulative_importance(config: Config, score: Artifact, title: str = "") -> Picture:
    """Plot the cumulative importance for each system and its null, and say how many elements reach θ.

    title: where a page has several.
    """
    theta = config.partition.theta
    scores = read_importance(score.path / "importance.safetensors")
    curves = {f"System {system}": _cumulative(flatten_weights(tensors)) for system, tensors in scores.items()}
    products = _products(config, score)
    nulls = {
        null: {f"System {system}": _cumulative(draw) for system, draw in draws.items()}
        for null in (BY_WEIGHT, BY_FEATURE)
        if products and (draws := gaussian_null(products, by_feature=null == BY_FEATURE))
    }
    shares = []
    for name, curve in curves.items():
        chance = [
            f"{_share_reaching(theta, drawn[name])} for {null}"
            for null, drawn in nulls.items()
            if name in drawn
        ]
        beside = f" ({', '.join(chance)})" if chance else ""
        shares.append(f"{_share_reaching(theta, curve)} of the elements for {name}{beside}")
    text = f"{title}: cumulative" if title else "Cumulative"
    text += f" importance; {100 * theta:g} % of it is reached by about {', '.join(shares)}."
    if nulls:
        text += (
            " Gaussians are products of two random numbers, with the mean of each weight, or of each feature "
            "(a column of A, a row of B). No more concentrated than the latter, the importance "
            "is concentrated between features, not within them."
        )
    return Picture(figures.svg(figures.cumulative_curves(curves, nulls, theta)), text, text)


def importance_by_system(config: Config, score: Artifact, masks: Artifact, title: str) -> Picture:
    """Plot importance for System 1 against that for System 2, for a sample of the elements of each region.

    Both are divided by their L2 norm, as in the figure of arXiv 2507.20999. title: where a page has several.
    """
    scores = {
        system: flatten_weights(tensors).double()
        for system, tensors in read_importance(score.path / "importance.safetensors").items()
    }
    first, second = (scores[system] / scores[system].norm().clamp(min=1e-300) for system in (1, 2))
    region = flatten_weights(Masks.load(masks.path / "masks.safetensors", masks.manifest["variant"]).region)
    positive = (first > 0) & (second > 0)  # the axes are logarithmic
    groups = {}
    for name, code in CODES.items():
        indices = ((region == code) & positive).nonzero().flatten()
        # At most DOTS of them, evenly spaced in the order of the elements.
        indices = indices[torch.linspace(0, max(0, len(indices) - 1), min(DOTS, len(indices))).long()]
        groups[REGION_TITLES[name]] = (first[indices].tolist(), second[indices].tolist())
    summary = masks.manifest["summary"]
    facts = [
        f"{100 * summary[key]:.1f} % of System {system}'s set belong to it alone"
        for system, key in ((1, "s1_only_share"), (2, "s2_only_share"))
        if key in summary  # artifacts of earlier versions lack it
    ]
    facts.append(f"Jaccard index {summary['jaccard']:.3f}{_expected_jaccard(config, score)}")
    text = f"{title}: {', '.join(facts)}." if title else f"{', '.join(facts)}."
    svg = figures.svg(figures.scatter(groups, title))
    return Picture(svg, f"Importance by system. {text}", text)


def _expected_jaccard(config: Config, score: Artifact) -> str:
    """Say which Jaccard index both systems would have under the null, where they have one and sets by θ."""
    products = _products(config, score)
    if config.partition.strategy != "importance" or len(products) < 2:
        return ""
    return f" ({null_jaccard(products, config.partition.theta):.3f} for {BY_WEIGHT})"


def _share_reaching(theta: float, curve: figures.Curve) -> str:
    """Return the share of the elements that hold θ of the importance, in per cent."""
    elements, importance = curve
    return f"{100 * np.interp(theta, importance, elements):.0f} %"


def _cumulative(scores: Tensor) -> figures.Curve:
    """Sort by importance; return shares of the elements and the shares of the importance that they hold."""
    ordered = scores.double().sort(descending=True).values.cumsum(0)
    at = torch.linspace(0, len(ordered) - 1, POINTS).long().unique()
    total = ordered[-1].clamp(min=1e-300)
    return ((at + 1) / len(ordered)).tolist(), (ordered[at] / total).tolist()


Cells = dict[tuple[int, str], Tensor]
"""Layer and module → the region codes of its A and B."""


def _maps(masks: Artifact) -> Iterator[Block]:
    """Draw a heat map of each region's share of the elements by layer and module, and say how to read it."""
    cells = _cells(Masks.load(masks.path / "masks.safetensors", masks.manifest["variant"]).region)
    if not cells:
        return
    pictures = []
    for name, code in CODES.items():
        title = f"{REGION_TITLES[name]}: {_percent(torch.cat(list(cells.values())), code):.1f} % of all"
        rows, columns, shares = _grid(cells, code)
        present = [share for row in shares for share in row if not math.isnan(share)]
        text = f"{title}; by layer and module from {min(present):.0f} to {max(present):.0f} %."
        pictures.append(Picture(figures.svg(figures.heat_map(rows, columns, shares, title)), text))
    yield Text(
        "How to read the maps: a cell is one module of one layer, and its colour is the share of its "
        "elements, A and B together, that lie in the region. If the elements lay anywhere at random, all "
        "cells of a map would have about the share in its title."
    )
    yield Pictures(pictures)


def _cells(region: dict[str, Tensor]) -> Cells:
    matrices: dict[tuple[int, str], list[Tensor]] = {}
    for name, codes in region.items():
        if match := re.search(r"\.(\d+)\.([\w.]+)\.lora_[AB]\b", name):
            matrices.setdefault((int(match[1]), match[2]), []).append(codes.flatten())
    return {place: torch.cat(codes) for place, codes in matrices.items()}


def _grid(cells: Cells, code: int) -> tuple[list[str], list[str], list[list[float]]]:
    """Return names of layers and modules, and a region's share of each; NaN where a layer lacks a module."""
    layers = sorted({layer for layer, _ in cells})
    modules = list(dict.fromkeys(module for _, module in cells))
    percent = {place: _percent(codes, code) for place, codes in cells.items()}
    shares = [[percent.get((layer, module), math.nan) for module in modules] for layer in layers]
    return [str(layer) for layer in layers], _short_names(modules), shares


def _percent(codes: Tensor, code: int) -> float:
    """The percentage of the elements that have this region code."""
    return 100 * int((codes == code).sum()) / codes.numel()


def _short_names(modules: list[str]) -> list[str]:
    """Shorten each path to its last component where that is unique, and drop the suffix `_proj`."""
    last = [path.rpartition(".")[2] for path in modules]
    names = [name if last.count(name) == 1 else path for name, path in zip(last, modules, strict=True)]
    return [name.removesuffix("_proj") for name in names]


def gaussian_null(importance: dict[int, dict[str, Tensor]], by_feature: bool = False) -> dict[int, Tensor]:
    """Draw |g·φ| with independent Gaussian g and φ for each element, scaled to its weight's mean importance.

    Such products are concentrated by themselves: small for most elements, large for a few. Only what goes
    beyond this null says something about the model. by_feature: scaled to the mean of the element's feature,
    so that only what goes beyond it says something about single elements. importance: system → parameter
    name → scores. Each system has its own g; φ is shared, as the systems score the same values. Returns
    (elements,) for each system, or a sample of at most about SAMPLE elements of a larger model. The seed is
    fixed: repeated calls agree.
    """
    generator = torch.Generator().manual_seed(0)
    weights = next(iter(importance.values()))
    share = min(1.0, SAMPLE / sum(weight.numel() for weight in weights.values()))
    draws: dict[int, list[Tensor]] = {system: [] for system in importance}
    for name in sorted(weights):
        size = math.ceil(weights[name].numel() * share)
        value, *gradients = torch.randn(1 + len(importance), size, generator=generator)
        for (system, scores), gradient in zip(importance.items(), gradients, strict=True):
            means = _feature_means(name, scores[name]) if by_feature else scores[name].double().mean()[None]
            means = means[torch.arange(size) * len(means) // size]  # as many elements of each, in its order
            # For standard normals E|g·φ| = E|g| · E|φ| = √(2/π)² = 2/π, so π/2 scales the mean to 1.
            draws[system].append((gradient * value).abs() * (means * math.pi / 2))
    return {system: torch.cat(products).float() for system, products in draws.items()}


def _feature_means(name: str, scores: Tensor) -> Tensor:
    """Estimate the expected importance in each feature, a column of A or a row of B: (features,).

    A feature has an element for each rank, so its mean varies by chance, too. So the means are drawn together
    around their own mean until their variance is that of the expected values alone.
    """
    features = scores.double().T if ".lora_A." in name else scores.double()  # (features, ranks)
    means = features.mean(1)
    center, variance = means.mean(), means.var(correction=0)
    # Var |g·φ| is π²/4 − 1 times the squared mean, because E(g·φ)² = 1 and E|g·φ| = 2/π. So for expected
    # values x, E mean² = E x² · (1 + by_chance).
    by_chance = (math.pi**2 / 4 - 1) / features.shape[1]
    of_expected = (center.square() + variance) / (1 + by_chance) - center.square()
    return center + (of_expected.clamp(min=0) / variance.clamp(min=1e-300)).sqrt() * (means - center)


def null_jaccard(importance: dict[int, dict[str, Tensor]], theta: float) -> float:
    """Compute the Jaccard index of both systems' sets at θ under the null by weight."""
    first, second = (needed_set(draw, theta, "the null") for draw in gaussian_null(importance).values())
    return int((first & second).sum()) / int((first | second).sum())
