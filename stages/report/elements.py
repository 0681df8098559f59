"""What a page shows of the elements: how the importance is spread, and where each region lies."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING

from stages.config import Config
from stages.report import figures
from stages.report.page import Grid, Part, Picture, Pictures, Text
from stages.store.artifacts import Artifact

if TYPE_CHECKING:
    from torch import Tensor

POINTS = 200
"""Of a cumulative curve."""
DOTS = 2000
"""Of each region in the figure of both systems' importance."""


def parts(config: Config, found: dict[str, Artifact]) -> list[Part]:
    made = _of(config, found.get("score"), found.get("partition:sft"), "")
    if "score:rl" in found:
        made.append(Text("For RL the elements were scored again, at the adapter of SFT."))
        made += _of(config, found["score:rl"], found.get("partition:rl"), "for RL")
    return made


def _of(config: Config, score: Artifact | None, masks: Artifact | None, title: str) -> list[Part]:
    """title: of the figure of both systems, where there are several."""
    made: list[Part] = []
    if masks is not None:
        summary = masks.manifest["summary"]
        names = [name for name in ("s1_only", "s2_only", "shared", "none") if name in summary]
        total = summary["elements"]
        rows = [[n.replace("_", " "), f"{summary[n]:,}", f"{100 * summary[n] / total:.1f} %"] for n in names]
        made.append(Grid(["region", "elements", "share"], rows, f"Of {total:,} LoRA elements."))
    if score is not None and (score.path / "importance.safetensors").is_file():
        pictures = [_importance(config, score)]
        if masks is not None:
            pictures.append(both(score, masks, title))
        made.append(Pictures(pictures))
    if masks is not None:
        made += _regions(masks)
    return made


def _importance(config: Config, score: Artifact) -> Picture:
    from stages.lora.importance.masks import flat, read_importance

    scores = read_importance(score.path / "importance.safetensors")
    curves = {f"System {system}": _cumulative(flat(part)) for system, part in scores.items()}
    theta = config.partition.theta
    needed = {
        name: next((x for x, y in zip(*curve, strict=True) if y >= theta), 1.0)
        for name, curve in curves.items()
    }
    said = ", ".join(f"{100 * share:.0f} % of the elements for {name}" for name, share in needed.items())
    text = f"Cumulative importance; {theta:g} of it is reached by about {said}."
    return Picture(figures.svg(figures.cumulative(curves, theta)), text, text)


def both(score: Artifact, masks: Artifact, title: str) -> Picture:
    """Importance for System 1 against that for System 2, of a sample of the elements of each region.

    Both are divided by their L2 norm, as in the figure of arXiv 2507.20999. title: where there are several.
    """
    import torch

    from stages.lora.importance.masks import Masks, flat, read_importance
    from stages.lora.importance.strategies import S1_ONLY, S2_ONLY, SHARED

    scores = {
        system: flat(part).double()
        for system, part in read_importance(score.path / "importance.safetensors").items()
    }
    first, second = (part / part.norm().clamp(min=1e-300) for part in (scores[1], scores[2]))
    region = flat(Masks.load(masks.path / "masks.safetensors", masks.manifest["variant"]).region)
    seen = (first > 0) & (second > 0)
    groups = {}
    for name, code in (("S1-only", S1_ONLY), ("S2-only", S2_ONLY), ("shared", SHARED)):
        there = ((region == code) & seen).nonzero().flatten()
        there = there[torch.linspace(0, max(0, len(there) - 1), min(DOTS, len(there))).long()]
        groups[name] = (first[there].tolist(), second[there].tolist())
    summary = masks.manifest["summary"]
    told = [
        f"{name} {100 * summary[key]:.1f} % of its system's set"
        for name, key in (("S1-only", "s1_only_share"), ("S2-only", "s2_only_share"))
        if key in summary  # it is not in those of earlier versions
    ]
    told.append(f"Jaccard index {summary['jaccard']:.3f}")
    text = f"{', '.join(told)}."
    text = f"{title}: {text}" if title else text
    red, blue, purple = figures.PALETTE[4], figures.PALETTE[0], figures.PALETTE[3]
    drawn = figures.against(groups, [red, blue, purple], title)
    return Picture(figures.svg(drawn), f"Importance by system. {text}", text)


def _cumulative(scores: Tensor) -> tuple[list[float], list[float]]:
    """Shares of the elements, most important first, and of the importance that they hold."""
    import torch

    ordered = scores.double().sort(descending=True).values.cumsum(0)
    at = torch.linspace(0, len(ordered) - 1, POINTS).long().unique()
    total = ordered[-1].clamp(min=1e-300)
    return ((at + 1) / len(ordered)).tolist(), (ordered[at] / total).tolist()


def _regions(masks: Artifact) -> list[Part]:
    """Heat maps of the share of each region, layer × module, A and B apart, beside a draw at random."""
    from stages.lora.importance.masks import Masks

    region = Masks.load(masks.path / "masks.safetensors", masks.manifest["variant"]).region
    control = _shuffled(region)
    made: list[Part] = [
        Text(
            "By layer and module; the second line of each has the same elements put anywhere at random.", True
        )
    ]
    for factor in ("A", "B"):
        pairs = [_cells(one, factor) for one in (region, control)]
        if pairs[0]:
            made += [Pictures(line) for line in _heat_maps(pairs[0], pairs[1], factor)]
    return made if len(made) > 1 else []


def _shuffled(region: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same regions, with as many elements each, put anywhere at random."""
    import torch

    whole = torch.cat([tensor.flatten() for tensor in region.values()])
    mixed = whole[torch.randperm(len(whole), generator=torch.Generator().manual_seed(0))]
    parts = mixed.split([tensor.numel() for tensor in region.values()])
    return {name: part.view_as(region[name]) for name, part in zip(region, parts, strict=True)}


Cells = dict[tuple[int, str], "Tensor"]
"""Layer and module → its region codes."""


def _cells(region: dict[str, Tensor], factor: str) -> Cells:
    found = {}
    for name, tensor in region.items():
        if match := re.search(rf"\.(\d+)\.([\w.]+)\.lora_{factor}\b", name):
            found[int(match[1]), match[2]] = tensor
    return found


def _heat_maps(cells: Cells, control: Cells, factor: str) -> tuple[list[Picture], list[Picture]]:
    """Of each region, and of each at random, with one scale for both."""
    from stages.lora.importance.strategies import S1_ONLY, S2_ONLY, SHARED

    layers = sorted({layer for layer, _ in cells})
    modules = list(dict.fromkeys(module for _, module in cells))
    names = _short(modules)
    real: list[Picture] = []
    random: list[Picture] = []
    for title, code in (("S1-only", S1_ONLY), ("S2-only", S2_ONLY), ("shared", SHARED)):
        both = [
            [
                [
                    100 * float((part[at, m] == code).float().mean()) if (at, m) in part else math.nan
                    for m in modules
                ]
                for at in layers
            ]
            for part in (cells, control)
        ]
        there = [[x for line in shares for x in line if not math.isnan(x)] for shares in both]
        ends = min(map(min, there)), max(map(max, there))
        for made, shares, values, how in zip((real, random), both, there, ("", " at random"), strict=True):
            drawn = figures.heat(
                [str(at) for at in layers], names, shares, f"{title}{how}, {factor}, %", ends
            )
            text = (
                f"Share of {title} elements in each {factor} matrix{how}, by layer and module: from "
                f"{min(values):.0f} to {max(values):.0f} %."
            )
            made.append(Picture(figures.svg(drawn), text))
    return real, random


def _short(modules: list[str]) -> list[str]:
    """The last part of each module's path, where no other ends alike; `_proj` goes without saying."""
    last = [path.rpartition(".")[2] for path in modules]
    shown = [name if last.count(name) == 1 else path for name, path in zip(last, modules, strict=True)]
    return [name.removesuffix("_proj") for name in shown]
