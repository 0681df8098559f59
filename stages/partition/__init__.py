"""Split the elements into S1-only, S2-only and shared; write the masks of SFT and RL.

Each variant has the elements that one stage trains: `sft` or `rl`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from stages.config import Config
from stages.pipeline.stage import WEIGHTS, Stage, protected_step

if TYPE_CHECKING:
    from stages.plan.cost_model import CostModel
    from stages.plan.estimate import Cost
    from stages.store.digests import DigestCache


def _inputs(config: Config, trained: str) -> tuple[str, ...]:
    scores = "score:rl" if trained == "rl" and config.rl.rescore else "score"
    return (*protected_step(config), scores)


def _external_key(config: Config, _: str, cache: DigestCache) -> dict[str, Any]:
    section = config.partition
    return {"protect_theta": section.protect_theta} if section.protect else {}


def _cost(model: CostModel, _: str) -> Cost:
    from stages.plan.cost_model import NOTHING

    return NOTHING


STAGE = Stage(
    name="partition",
    inputs=_inputs,
    sections=lambda config, _: ("partition", "seed"),
    external_key=_external_key,
    variants=lambda config: ("sft", "rl"),
    variants_help="sft or rl",
    files={
        "masks.safetensors": "`region/NAME`: uint8 (0 none, 1 System 1 only, 2 System 2 only, 3 shared). "
        "`active/sft/NAME` or `active/rl/NAME`: bool, true where the stage trains; a second round of "
        f"SFT trains RL's. All {WEIGHTS}.",
    },
    cost=_cost,
    version=2,
)
