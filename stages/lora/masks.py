"""importance.safetensors per system, masks.safetensors per training stage, keyed by PEFT's parameter names."""

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
    """Float32 tensors `s1/<name>` and `s2/<name>`, each of the shape of the weight's trainable part."""
    save_file(
        {f"s{k}/{n}": t.float().contiguous().cpu() for k, part in scores.items() for n, t in part.items()},
        path,
    )


def read_importance(path: Path) -> dict[int, dict[str, Tensor]]:
    tensors = _load(path)
    return {k: {n[3:]: t for n, t in tensors.items() if n.startswith(f"s{k}/")} for k in (1, 2)}


@dataclass(frozen=True)
class Masks:
    """Per parameter name: region (uint8) and active elements of one training stage (bool), of the trainable part's shape."""

    region: dict[str, Tensor]
    active: dict[str, Tensor]

    @classmethod
    def cut(cls, region: Tensor, active: Tensor, shapes: dict[str, torch.Size]) -> Masks:
        """From masks over concatenated weights, cut back into weights; both go by sorted parameter name."""
        parts: list[dict[str, Tensor]] = []
        for flat in (region, active):
            pieces = flat.split([shapes[name].numel() for name in sorted(shapes)])
            parts.append(
                {n: piece.view(shapes[n]).clone() for n, piece in zip(sorted(shapes), pieces, strict=True)}
            )
        return cls(*parts)

    def write(self, path: Path, stage: str) -> None:
        """As `region/<name>` and `active/<stage>/<name>`."""
        groups = ((REGION, self.region), (f"{ACTIVE}/{stage}", self.active))
        save_file({f"{kind}/{name}": tensor for kind, part in groups for name, tensor in part.items()}, path)

    @classmethod
    def load(cls, path: Path, stage: str) -> Masks:
        tensors = _load(path)
        kinds = (f"{REGION}/", f"{ACTIVE}/{stage}/")
        return cls(*({n.removeprefix(k): t for n, t in tensors.items() if n.startswith(k)} for k in kinds))


def flat(tensors: dict[str, Tensor]) -> Tensor:
    """All weights in one 1-D tensor, by sorted parameter name."""
    return torch.cat([tensors[name].flatten() for name in sorted(tensors)])


def _load(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"cannot read {path}: {error}") from None
