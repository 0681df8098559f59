"""Split the elements into S1-only, S2-only and shared; write the masks of SFT and RL.

Each variant has the elements that one stage trains: `sft` or `rl`.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from stages.config import Config
from stages.config.training import BY_DENSITY
from stages.errors import UnusableResult
from stages.lora.examples import PROTECTED
from stages.lora.importance.strategies import number_of
from stages.pipeline.stage import WEIGHTS, Planned, Stage
from stages.pipeline.stage import Check as Check
from stages.plan.work import Work

if TYPE_CHECKING:
    from stages.pipeline.steps import Step as Step
    from stages.plan.texts import Texts


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


def _check_density(texts: Texts) -> None:
    """Raise UnusableResult if the density selects no element."""
    from stages.lora.adapter import adapter

    section = texts.config.partition
    if section.strategy not in BY_DENSITY:
        return
    sizes = adapter.weight_sizes(texts.base, texts.config.lora)
    elements = max(sizes) if section.strategy == "topk_within" else sum(sizes)
    if not number_of(section.density, elements):
        raise UnusableResult(
            f"partition.density {section.density:g} of {elements} elements is none", "raise partition.density"
        )


STAGE = Stage(
    name="partition",
    steps=_steps,
    variants_help="sft or rl",
    files={
        "masks.safetensors": "`region/NAME`: uint8 (0 none, 1 System 1 only, 2 System 2 only, 3 shared). "
        "`active/sft/NAME` or `active/rl/NAME`: bool, true where the stage trains; a second round of "
        f"SFT trains RL's. All {WEIGHTS}.",
    },
    checks=lambda texts, _: [partial(_check_density, texts)],
    work=lambda texts, _: Work(copies=0),
    version=2,
)
