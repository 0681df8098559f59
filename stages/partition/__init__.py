"""Split the elements into S1-only, S2-only and shared; write the masks of SFT and RL.

Each variant has the elements that one stage trains: `sft` or `rl`.
"""

from dataclasses import replace

from stages.config import Config
from stages.lora.examples import PROTECTED
from stages.pipeline.stage import Planned, Stage
from stages.plan.tokens import Work

SYSTEMS = {"sft": 1, "rl": 2}
"""Variant → the system for which the elements of its masks train."""


def _steps(config: Config) -> list[Planned]:
    protect = bool(config.partition.protect)
    step = Planned(
        inputs=(f"score:{PROTECTED}", "score") if protect else ("score",),
        sections=("partition", "seed"),
        settings=("partition.protect_theta",) if protect else (),
    )
    return [replace(step, variant=trained) for trained in SYSTEMS]


STAGE = Stage(
    name="partition",
    steps=_steps,
    variants_help="sft or rl",
    files={
        "masks.safetensors": "`region/NAME`: uint8 (0 none, 1 System 1 only, 2 System 2 only, 3 shared). "
        "`active/sft/NAME` or `active/rl/NAME`: bool, true where the stage trains."
    },
    work=lambda texts, _: Work(copies=0),
    version=2,
)
