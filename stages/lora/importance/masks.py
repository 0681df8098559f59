"""Files of importance scores per system and of masks per training stage, keyed by PEFT's parameter names."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from stages.errors import ArtifactError
from stages.lora.examples import PROTECTED

FILE = "masks.safetensors"
REGION, ACTIVE = "region", "active"
PREFIXES: dict[Any, str] = {1: "s1/", 2: "s2/", PROTECTED: f"{PROTECTED}/"}
"""Rows that elements are scored for, a system's or the protected ones → prefix of their tensors' names."""


def write_importance(path: Path, scores: dict[Any, dict[str, Tensor]]) -> None:
    """Write float32 tensors, each in the shape of the weight's trainable part; see PREFIXES."""
    tensors = {
        f"{PREFIXES[rows]}{name}": tensor.float().contiguous().cpu()
        for rows, by_name in scores.items()
        for name, tensor in by_name.items()
    }
    save_file(tensors, path)


def read_importance(path: Path) -> dict[Any, dict[str, Tensor]]:
    """Read what `write_importance` wrote: a key of PREFIXES → parameter name → float32 scores."""
    tensors = _load(path)
    scores = {rows: _with_prefix(prefix, tensors) for rows, prefix in PREFIXES.items()}
    return {rows: by_name for rows, by_name in scores.items() if by_name}


@dataclass(frozen=True)
class Masks:
    """Masks of one training stage by parameter name, each in the shape of the weight's trainable part."""

    region: dict[str, Tensor]
    """uint8: see `strategies.Split`."""
    active: dict[str, Tensor]
    """bool: the elements that the stage trains."""

    @classmethod
    def from_flat(cls, region: Tensor, active: Tensor, shapes: dict[str, torch.Size]) -> Masks:
        """Split masks over all weights, in the order of `flatten_weights`, into one mask per weight."""
        names = sorted(shapes)  # the order in which `flatten_weights` concatenates
        sizes = [shapes[name].numel() for name in names]

        def by_name(mask: Tensor) -> dict[str, Tensor]:
            pieces = zip(names, mask.split(sizes), strict=True)
            return {name: piece.view(shapes[name]).clone() for name, piece in pieces}

        return cls(by_name(region), by_name(active))

    def write(self, folder: Path, stage: str) -> None:
        """Write the tensors as `region/<name>` and `active/<stage>/<name>`."""
        tensors = {f"{REGION}/{name}": tensor for name, tensor in self.region.items()}
        tensors |= {f"{ACTIVE}/{stage}/{name}": tensor for name, tensor in self.active.items()}
        save_file(tensors, folder / FILE)

    @classmethod
    def load(cls, partition: Path, stage: str) -> Masks:
        """The masks in the folder of an artifact of partition, of the variant for that stage."""
        tensors = _load(partition / FILE)
        return cls(_with_prefix(f"{REGION}/", tensors), _with_prefix(f"{ACTIVE}/{stage}/", tensors))


def read_masks(partition: Path, stage: str) -> dict[str, Tensor]:
    """The elements that a stage (`sft` or `rl`) trains, for `sparsify`. partition: its artifact's folder."""
    if not (masks := Masks.load(Path(partition), stage).active):
        raise ArtifactError(f"{partition} has no masks of a stage {stage!r}")
    return masks


def flatten_weights(tensors: dict[str, Tensor]) -> Tensor:
    """Concatenate all weights into one 1-D tensor, in the order of their sorted parameter names."""
    return torch.cat([tensors[name].flatten() for name in sorted(tensors)])


def _with_prefix(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): t for key, t in tensors.items() if key.startswith(prefix)}


def _load(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"cannot read {path}: {error}") from None
