"""Give each element a region by its importance, and choose the elements that SFT or RL trains."""

from typing import Any

import torch
from torch import Tensor

from stages.config import PartitionSection
from stages.config.training import BY_DENSITY
from stages.errors import UnusableResult
from stages.lora.examples import PROTECTED
from stages.lora.importance.masks import Masks, flatten_weights, read_importance
from stages.lora.importance.strategies import needed_set, strategies
from stages.partition import SYSTEMS
from stages.pipeline.context import StageContext
from stages.records import read_json


def run(context: StageContext, partition: PartitionSection, seed: int) -> dict[str, Any]:
    """Write `masks.safetensors`: the regions, and the active elements, which the variant (sft or rl) trains.

    What the protected rows need is active in no stage, whichever region it is of. Returns the size of each
    region and the active share. UnusableResult if no element is active.
    """
    score = context.inputs["score"].path
    by_name = read_json(score / "shapes.json")
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
        if not bool(active.any()):
            share = "alpha" if SYSTEMS[context.variant] == 1 else "beta"
            by_density = partition.strategy in BY_DENSITY
            hint = f"raise partition.{'density' if by_density else f'theta or partition.{share}'}"
        raise UnusableResult(f"no element is active in {context.variant}", hint)
    active &= ~protected
    Masks.from_flat(split.region, active, shapes).write(context.out, context.variant)
    # In the order of the numbers of regions. Shares are 0 of a system that needs no element.
    none, s1_only, s2_only, shared = torch.bincount(split.region, minlength=4).tolist()
    return {
        "elements": len(active),
        "s1_only": s1_only,
        "s2_only": s2_only,
        "shared": shared,
        "none": none,
        "s1_only_share": s1_only / max(1, s1_only + shared),
        "s2_only_share": s2_only / max(1, s2_only + shared),
        "jaccard": shared / max(1, s1_only + s2_only + shared),
        **({"protected": int(protected.sum())} if partition.protect else {}),
        "active": int(active.sum()),
        "active_share": int(active.sum()) / len(active),
    }


def _protected(context: StageContext, partition: PartitionSection, elements: int) -> Tensor:
    """The elements that the protected rows need, as a bool mask; none without such rows."""
    artifact = context.inputs.get(f"score:{PROTECTED}")
    if artifact is None:
        return torch.zeros(elements, dtype=torch.bool)
    scores = read_importance(artifact.path / "importance.safetensors")[PROTECTED]
    return needed_set(flatten_weights(scores), partition.protect_theta, "the protected rows")
