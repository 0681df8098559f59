"""Ablation of a trained adapter: one region keeps its trained values, all other elements are reset."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from stages.config import REGIONS
from stages.errors import ArtifactError
from stages.lora.adapter import adapter
from stages.lora.importance.masks import Masks
from stages.lora.importance.strategies import S1_ONLY, S2_ONLY, SHARED

REGION_OF_TARGET = dict(zip(REGIONS, (S1_ONLY, S2_ONLY, SHARED), strict=True))
"""The region that keeps its trained values, by evaluation target."""


def write(target: str, trained: Path, start: Path, masks: Masks, out: Path) -> None:
    """Write into `out` the adapter of `trained`, with elements outside the target's region reset to `start`.

    start: the initial adapter. The frozen half of a compensated adapter also comes from it. ArtifactError
    unless both adapters and the masks have the same parameter names.
    """
    initial_weights, trained_weights = adapter.read(start), adapter.read(trained)
    if not initial_weights.keys() == trained_weights.keys() == masks.region.keys():
        raise ArtifactError(f"{trained}, {start} and the masks are not of one adapter")
    weights: dict[str, Tensor] = {}
    for name, weight in trained_weights.items():
        in_region = masks.region[name] == REGION_OF_TARGET[target]
        keep_trained = adapter.full_mask(name, in_region, weight)
        weights[name] = torch.where(keep_trained, weight, initial_weights[name])
    shutil.copytree(trained, out, dirs_exist_ok=True)  # the adapter's config; its weights are replaced
    save_file(weights, out / adapter.ADAPTER, metadata={"format": "pt"})
