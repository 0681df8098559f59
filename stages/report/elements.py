"""The elements on a page: how the importance is spread over them, and in which layers each region lies."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING

from stages.config import Config
from stages.report import figures
from stages.report.page import Block, Grid, Picture, Pictures, Text
from stages.store.artifacts import Artifact

if TYPE_CHECKING:
    from torch import Tensor

POINTS = 200
"""Points of a cumulative curve."""
DOTS = 2000
"""Most elements of each region in the scatter plot of both systems' importance."""


def parts(config: Config, artifacts: dict[str, Artifact]) -> list[Block]:
    """Build the blocks of SFT's elements, and those of RL's if they were scored again."""
    blocks = _stage(config, artifacts.get("score"), artifacts.get("partition:sft"), "")
    if "score:rl" in artifacts:
        blocks.append(Text("For RL the elements were scored again, at the adapter of SFT."))
        blocks += _stage(config, artifacts["score:rl"], artifacts.get("partition:rl"), "for RL")
    return blocks


def _stage(config: Config, score: Artifact | None, masks: Artifact | None, title: str) -> list[Block]:
    """Build the blocks of one training stage. title: of the scatter plot, where a page has several."""
    blocks: list[Block] = []
    if masks is not None:
        summary = masks.manifest["summary"]
        names = [name for name in ("s1_only", "s2_only", "shared", "none") if name in summary]
        total = summary["elements"]
        rows = [[n.replace("_", " "), f"{summary[n]:,}", f"{100 * summary[n] / total:.1f} %"] for n in names]
        blocks.append(Grid(["region", "elements", "share"], rows, f"Of {total:,} LoRA elements."))
    if score is not None and (score.path / "importance.safetensors").is_file():
        pictures = [_importance(config, score)]
        if masks is not None:
            pictures.append(importance_by_system(score, masks, title))
        blocks.append(Pictures(pictures))
    if masks is not None:
        blocks += _regions(masks)
    return blocks


def _importance(config: Config, score: Artifact) -> Picture:
    """Plot the cumulative importance for each system, and say how many elements reach θ."""
    from stages.lora.importance.masks import flatten_weights, read_importance

    scores = read_importance(score.path / "importance.safetensors")
    curves = {f"System {system}": _cumulative(flatten_weights(tensors)) for system, tensors in scores.items()}
    theta = config.partition.theta
    needed = {
        name: next((x for x, y in zip(*curve, strict=True) if y >= theta), 1.0)
        for name, curve in curves.items()
    }
    shares = ", ".join(f"{100 * share:.0f} % of the elements for {name}" for name, share in needed.items())
    text = f"Cumulative importance; {theta:g} of it is reached by about {shares}."
    return Picture(figures.svg(figures.cumulative_curves(curves, theta)), text, text)


def importance_by_system(score: Artifact, masks: Artifact, title: str) -> Picture:
    """Plot importance for System 1 against that for System 2, for a sample of the elements of each region.

    Both are divided by their L2 norm, as in the figure of arXiv 2507.20999. title: where a page has several.
    """
    import torch

    from stages.lora.importance.masks import Masks, flatten_weights, read_importance
    from stages.lora.importance.strategies import S1_ONLY, S2_ONLY, SHARED

    scores = {
        system: flatten_weights(tensors).double()
        for system, tensors in read_importance(score.path / "importance.safetensors").items()
    }
    first, second = (scores[system] / scores[system].norm().clamp(min=1e-300) for system in (1, 2))
    region = flatten_weights(Masks.load(masks.path / "masks.safetensors", masks.manifest["variant"]).region)
    positive = (first > 0) & (second > 0)  # the axes are logarithmic
    groups = {}
    for name, code in (("S1-only", S1_ONLY), ("S2-only", S2_ONLY), ("shared", SHARED)):
        indices = ((region == code) & positive).nonzero().flatten()
        # At most DOTS of them, evenly spaced in the order of the elements.
        indices = indices[torch.linspace(0, max(0, len(indices) - 1), min(DOTS, len(indices))).long()]
        groups[name] = (first[indices].tolist(), second[indices].tolist())
    summary = masks.manifest["summary"]
    facts = [
        f"{name} {100 * summary[key]:.1f} % of its system's set"
        for name, key in (("S1-only", "s1_only_share"), ("S2-only", "s2_only_share"))
        if key in summary  # artifacts of earlier versions lack it
    ]
    facts.append(f"Jaccard index {summary['jaccard']:.3f}")
    text = f"{', '.join(facts)}."
    text = f"{title}: {text}" if title else text
    red, blue, purple = figures.PALETTE[4], figures.PALETTE[0], figures.PALETTE[3]
    svg = figures.svg(figures.scatter(groups, [red, blue, purple], title))
    return Picture(svg, f"Importance by system. {text}", text)


def _cumulative(scores: Tensor) -> tuple[list[float], list[float]]:
    """Sort by importance; return shares of the elements and the shares of the importance that they hold."""
    import torch

    ordered = scores.double().sort(descending=True).values.cumsum(0)
    at = torch.linspace(0, len(ordered) - 1, POINTS).long().unique()
    total = ordered[-1].clamp(min=1e-300)
    return ((at + 1) / len(ordered)).tolist(), (ordered[at] / total).tolist()


def _regions(masks: Artifact) -> list[Block]:
    """Draw heat maps of each region's share by layer and module, for A and B, above a random control."""
    from stages.lora.importance.masks import Masks

    region = Masks.load(masks.path / "masks.safetensors", masks.manifest["variant"]).region
    control = _shuffled(region)
    blocks: list[Block] = [
        Text(
            "By layer and module; the second line of each has the same elements put anywhere at random.", True
        )
    ]
    for factor in ("A", "B"):
        if cells := _cells(region, factor):
            blocks += [Pictures(line) for line in _heat_maps(cells, _cells(control, factor), factor)]
    return blocks if len(blocks) > 1 else []


def _shuffled(region: dict[str, Tensor]) -> dict[str, Tensor]:
    """Permute the region codes over all matrices: each region keeps its size, and lies anywhere at random."""
    import torch

    codes = torch.cat([tensor.flatten() for tensor in region.values()])
    permuted = codes[torch.randperm(len(codes), generator=torch.Generator().manual_seed(0))]
    chunks = permuted.split([tensor.numel() for tensor in region.values()])
    return {name: chunk.view_as(region[name]) for name, chunk in zip(region, chunks, strict=True)}


Cells = dict[tuple[int, str], "Tensor"]
"""Layer and module → the region codes of its matrix."""


def _cells(region: dict[str, Tensor], factor: str) -> Cells:
    cells = {}
    for name, tensor in region.items():
        if match := re.search(rf"\.(\d+)\.([\w.]+)\.lora_{factor}\b", name):
            cells[int(match[1]), match[2]] = tensor
    return cells


def _heat_maps(cells: Cells, control: Cells, factor: str) -> tuple[list[Picture], list[Picture]]:
    """Draw one heat map per region, and one of the control; both of a region have the same scale."""
    from stages.lora.importance.strategies import S1_ONLY, S2_ONLY, SHARED

    layers = sorted({layer for layer, _ in cells})
    modules = list(dict.fromkeys(module for _, module in cells))
    rows, columns = [str(layer) for layer in layers], _short_names(modules)
    pictures: tuple[list[Picture], list[Picture]] = ([], [])
    for title, code in (("S1-only", S1_ONLY), ("S2-only", S2_ONLY), ("shared", SHARED)):
        grids = [_shares(codes, code, layers, modules) for codes in (cells, control)]
        present = [[x for row in grid for x in row if not math.isnan(x)] for grid in grids]
        ends = min(map(min, present)), max(map(max, present))
        for line, grid, values, suffix in zip(pictures, grids, present, ("", " at random"), strict=True):
            heat_map = figures.heat_map(rows, columns, grid, f"{title}{suffix}, {factor}, %", ends)
            text = (
                f"Share of {title} elements in each {factor} matrix{suffix}, by layer and module: from "
                f"{min(values):.0f} to {max(values):.0f} %."
            )
            line.append(Picture(figures.svg(heat_map), text))
    return pictures


def _shares(cells: Cells, code: int, layers: list[int], modules: list[str]) -> list[list[float]]:
    """Compute a region's percentage of each matrix, layer × module; NaN where a layer lacks the module."""
    return [
        [
            100 * float((cells[layer, m] == code).float().mean()) if (layer, m) in cells else math.nan
            for m in modules
        ]
        for layer in layers
    ]


def _short_names(modules: list[str]) -> list[str]:
    """Shorten each path to its last component where that is unique, and drop the suffix `_proj`."""
    last = [path.rpartition(".")[2] for path in modules]
    names = [name if last.count(name) == 1 else path for name, path in zip(last, modules, strict=True)]
    return [name.removesuffix("_proj") for name in names]
