"""One region of a trained adapter alone: every other element is put back to where training began."""

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

KEPT = dict(zip(REGIONS, (S1_ONLY, S2_ONLY, SHARED), strict=True))
"""The region that each target of an evaluation keeps."""


def write(target: str, trained: Path, start: Path, masks: Masks, out: Path) -> None:
    """Write into `out` the adapter of `trained` with only the elements of the target's region.

    The others are those of `start`, the initial adapter, and so is the frozen half of a compensated one.
    ArtifactError unless all three fit.
    """
    before, after = adapter.read(start), adapter.read(trained)
    if not before.keys() == after.keys() == masks.region.keys():
        raise ArtifactError(f"{trained}, {start} and the masks are not of one adapter")
    kept: dict[str, Tensor] = {}
    for name, weight in after.items():
        here = adapter.full_mask(name, masks.region[name] == KEPT[target], weight)
        kept[name] = torch.where(here, weight, before[name])
    shutil.copytree(trained, out, dirs_exist_ok=True)
    save_file(kept, out / adapter.ADAPTER, metadata={"format": "pt"})
