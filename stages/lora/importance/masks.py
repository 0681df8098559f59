"""Files of importance per system and of masks per training stage, keyed by PEFT's parameter names."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from stages.errors import ArtifactError

REGION, ACTIVE = "region", "active"


def write_importance(path: Path, scores: dict[int, dict[str, Tensor]]) -> None:
    """Write float32 tensors `s1/<name>` and `s2/<name>`, each in the shape of the weight's trainable part."""
    tensors = {}
    for system, part in scores.items():
        for name, tensor in part.items():
            tensors[f"s{system}/{name}"] = tensor.float().contiguous().cpu()
    save_file(tensors, path)


def read_importance(path: Path) -> dict[int, dict[str, Tensor]]:
    tensors = _load(path)
    return {system: _below(f"s{system}/", tensors) for system in (1, 2)}


@dataclass(frozen=True)
class Masks:
    """Regions (uint8) and active elements of one training stage (bool), by parameter name.

    Every tensor has the shape of the weight's trainable part.
    """

    region: dict[str, Tensor]
    active: dict[str, Tensor]

    @classmethod
    def cut(cls, region: Tensor, active: Tensor, shapes: dict[str, torch.Size]) -> Masks:
        """Cut masks over the concatenated weights (see `flat`) back into one mask per weight."""
        names = sorted(shapes)
        sizes = [shapes[name].numel() for name in names]

        def pieces(mask: Tensor) -> dict[str, Tensor]:
            found = zip(names, mask.split(sizes), strict=True)
            return {name: piece.view(shapes[name]).clone() for name, piece in found}

        return cls(pieces(region), pieces(active))

    def write(self, path: Path, stage: str) -> None:
        """Write the tensors as `region/<name>` and `active/<stage>/<name>`."""
        tensors = {f"{REGION}/{name}": tensor for name, tensor in self.region.items()}
        tensors |= {f"{ACTIVE}/{stage}/{name}": tensor for name, tensor in self.active.items()}
        save_file(tensors, path)

    @classmethod
    def load(cls, path: Path, stage: str) -> Masks:
        tensors = _load(path)
        return cls(_below(f"{REGION}/", tensors), _below(f"{ACTIVE}/{stage}/", tensors))


def flat(tensors: dict[str, Tensor]) -> Tensor:
    """All weights concatenated into one 1-D tensor, in the order of their sorted parameter names."""
    return torch.cat([tensors[name].flatten() for name in sorted(tensors)])


def _below(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose key begins with `prefix`, by the rest of their key."""
    return {key.removeprefix(prefix): t for key, t in tensors.items() if key.startswith(prefix)}


def _load(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"cannot read {path}: {error}") from None
