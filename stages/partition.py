"""partition: from the importance of every element to regions, and the elements each training stage moves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from stages.config import PartitionSection
from stages.errors import MeaninglessError
from stages.lora.masks import Masks, flat, read_importance
from stages.lora.regions import NONE, S1_ONLY, S2_ONLY, SHARED, strategies

if TYPE_CHECKING:
    from stages.progress import Progress


def run(partition: PartitionSection, seed: int, score_dir: Path, out: Path, progress: Progress) -> dict[str, Any]:
    """Write `masks.safetensors` and return the number of elements of each region and the active shares.

    MeaninglessError if no element is active in both stages.
    """
    shapes = {name: torch.Size(shape) for name, shape in json.loads((score_dir / "shapes.json").read_text()).items()}
    if strategies.has(partition.strategy, "unscored"):
        scores = {1: torch.zeros(sum(shape.numel() for shape in shapes.values()))}
    else:
        scores = {system: flat(tensors) for system, tensors in read_importance(score_dir / "importance.safetensors").items()}
    progress.start("partition")
    split = strategies.pick(partition.strategy)(scores, partition, seed, [shapes[name].numel() for name in sorted(shapes)])
    if not bool(split.sft.any()) and not bool(split.rl.any()):
        raise MeaninglessError("no element is active in any stage", "raise partition.theta, alpha or beta")
    Masks.cut(split, shapes).write(out / "masks.safetensors")
    counts = torch.bincount(split.region, minlength=4).tolist()
    total = len(split.region)
    union = total - counts[NONE]
    return {
        "elements": total,
        "s1_only": counts[S1_ONLY],
        "s2_only": counts[S2_ONLY],
        "shared": counts[SHARED],
        "none": counts[NONE],
        "jaccard": counts[SHARED] / union if union else 0.0,
        "active_share_sft": int(split.sft.sum()) / total,
        "active_share_rl": int(split.rl.sum()) / total,
    }
