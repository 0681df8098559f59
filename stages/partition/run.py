"""Give each element a region by its importance, and choose the elements that SFT or RL trains."""

from __future__ import annotations

from typing import Any

import torch
from pydantic import PositiveInt
from torch import Tensor

from stages.config import PartitionSection
from stages.config.training import BY_DENSITY
from stages.errors import UnusableResult
from stages.lora.examples import PROTECTED
from stages.lora.importance.masks import Masks, flatten_weights, read_importance
from stages.lora.importance.strategies import (
    NONE,
    S1_ONLY,
    S2_ONLY,
    SHARED,
    needed_set,
    strategies,
)
from stages.partition import SYSTEMS
from stages.pipeline.context import StageContext
from stages.records import read_json


def run(context: StageContext, partition: PartitionSection, seed: int) -> dict[str, Any]:
    """Write `masks.safetensors`: the regions, and the active elements, which the variant (sft or rl) trains.

    What the protected rows need is active in no stage, whichever region it is of. Returns the size of each
    region and the active share. UnusableResult if no element is active.
    """
    score = context.inputs["score"].path
    by_name = read_json(score / "shapes.json", dict[str, tuple[PositiveInt, ...]])
    shapes = {name: torch.Size(shape) for name, shape in by_name.items()}
    # Scores are 1-D over all weights, in the order of their names; `sizes` says where each weight ends.
    if strategies.has_trait(partition.strategy, "unscored"):
        scores = {1: torch.zeros(sum(shape.numel() for shape in shapes.values()))}
    else:
        importance = read_importance(score / "importance.safetensors")
        scores = {system: flatten_weights(tensors) for system, tensors in importance.items()}
    context.progress.start(f"partition for {context.variant}")
    sizes = [shapes[name].numel() for name in sorted(shapes)]
    split = strategies.pick(partition.strategy)(scores, partition, seed, sizes)
    active = split.active[SYSTEMS[context.variant]]
    protected = _protected(context, partition, len(active))
    if not bool((active & ~protected).any()):
        hint = "the protected rows need all that it would train: lower partition.protect_theta"
        hint = hint if bool(active.any()) else _hint(SYSTEMS[context.variant], partition)
        raise UnusableResult(f"no element is active in {context.variant}", hint)
    active &= ~protected
    Masks.from_flat(split.region, active, shapes).write(context.out / "masks.safetensors", context.variant)
    counts = torch.bincount(split.region, minlength=4).tolist()
    total = len(split.region)
    union = total - counts[NONE]
    return {
        "elements": total,
        "s1_only": counts[S1_ONLY],
        "s2_only": counts[S2_ONLY],
        "shared": counts[SHARED],
        "none": counts[NONE],
        "s1_only_share": _exclusive_share(counts[S1_ONLY], counts[SHARED]),
        "s2_only_share": _exclusive_share(counts[S2_ONLY], counts[SHARED]),
        "jaccard": counts[SHARED] / union if union else 0.0,
        **({"protected": int(protected.sum())} if partition.protect else {}),
        "active": int(active.sum()),
        "active_share": int(active.sum()) / total,
    }


def _protected(context: StageContext, partition: PartitionSection, elements: int) -> Tensor:
    """The elements that the protected rows need, as a bool mask; none without such rows."""
    artifact = context.inputs.get(f"score:{PROTECTED}")
    if artifact is None:
        return torch.zeros(elements, dtype=torch.bool)
    scores = read_importance(artifact.path / "importance.safetensors")[PROTECTED]
    return needed_set(flatten_weights(scores), partition.protect_theta, "the protected rows")


def _hint(system: int, partition: PartitionSection) -> str:
    """The setting to change where no element is active."""
    if partition.strategy in BY_DENSITY:
        return "raise partition.density"
    return f"raise partition.theta or partition.{'alpha' if system == 1 else 'beta'}"


def _exclusive_share(exclusive: int, shared: int) -> float:
    """Share of a system's elements that the other system does not use."""
    return exclusive / (exclusive + shared) if exclusive + shared else 0.0
