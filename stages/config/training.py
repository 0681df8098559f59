"""Settings of score, partition, SFT and baselines, and those that SFT and RL share."""

from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, NonNegativeFloat, PositiveFloat, PositiveInt

from stages.config.fields import (
    PositiveShare,
    Section,
    Share,
    ShareBelowOne,
    advanced,
    advanced_unkeyed,
    as_value_error,
    registry_name,
    setting,
    unkeyed,
)
from stages.config.sources import PromptSection

AutoOff = Annotated[Literal["auto", "off"], BeforeValidator(lambda value: "off" if value is False else value)]
"""`auto` or `off`; also false, because YAML reads a bare `off` as false."""
Strategy = Annotated[str, registry_name("strategies")]


class BaselineSection(Section):
    method: Literal["prompt_tuning", "p_tuning", "prefix_tuning", "ia3"] = setting(...)
    """Method of PEFT, with 20 virtual tokens where it trains a prompt."""


WARMUP = "Share of the steps in which the learning rate rises; the last of them has the peak rate."
SAVE_STEPS = "Optimizer steps between checkpoints; a killed run continues from the last one."
DROPOUT = "Dropout on the input of the adapter; ia3 and the prompt methods have none."


class LaunchSection(Section):
    processes: int = advanced_unkeyed(1, gt=0, le=1024)
    """Processes on this machine that each hold the whole model and share the samples of a step (DDP), one for
    each GPU. Results differ by rounding and, in RL, by what is sampled."""


class ScoreSection(Section):
    scorer: str = setting("taylor2")
    """Importance formula, one of `lorapar list scorers`, or a function of scorer_file."""
    scorer_file: str | None = advanced_unkeyed(None)
    """Python file with your own formulas of an element's value, gradient and Fisher information."""
    examples: PositiveInt = setting(100, "Number of examples of each system.")
    batch_size: PositiveInt = unkeyed(8, "Examples per forward pass; halved if memory runs out.")
    prompt: PromptSection | None = advanced(None, "In place of the section `prompt`.")

    def conflicts(self, registries: Mapping[str, Any]) -> Iterable[str]:
        if registries:
            as_value_error(partial(registries["scorers"].check, self.scorer, self.scorer_file))
        return ()


BY_DENSITY = ("topk", "random_half")
"""Strategies whose number of elements follows from `density`."""
BY_THETA = ("importance", "random", "random_within")
"""Strategies whose number of elements follows from `theta`."""


class PartitionSection(Section):
    strategy: Strategy = setting("importance")
    """How elements are split between the systems, one of `lorapar list strategies`."""
    theta: PositiveShare = setting(0.9, ignored_by=("all", *BY_DENSITY))
    """θ: a system gets its most important elements until they have this share of its importance."""
    density: PositiveShare = advanced(0.5, ignored_by=("all", *BY_THETA))
    """Share of the elements that topk and random_half take."""
    alpha: Share = setting(1, "α: share of the shared elements that SFT trains.", ignored_by="partition:rl")
    beta: Share = setting(1, "β: share of the shared elements that RL trains.", ignored_by="partition:sft")
    protect: str | None = unkeyed(None)
    """Rows whose skill must survive: no stage trains an element that they need."""
    protect_theta: PositiveShare = unkeyed(0.9)
    """Share of the protected rows' importance that the protected elements have."""

    def conflicts(self, registries: Mapping[str, Any]) -> Iterator[str]:
        if self.protect and self.strategy in ("random", "random_within"):
            # Random elements are protected less often than important ones, so more of them would train.
            yield f"{self.strategy} is a control of equal size; with protect it would train more elements"


class TrainSection(Section):
    learning_rate: PositiveFloat = setting(2e-4, "Peak learning rate.")
    lr_scheduler_type: Literal["cosine", "linear", "constant"] = advanced("cosine")
    """Learning rate schedule after the warm-up."""
    warmup_ratio: ShareBelowOne = advanced(0.03, WARMUP)
    weight_decay: NonNegativeFloat = advanced(0.0, "Weight decay.")
    max_grad_norm: PositiveFloat = advanced(1.0, "Norm to which gradients are clipped.")
    num_train_epochs: float = setting(1, "Number of passes over the training rows.", gt=0, le=1e6)
    max_steps: PositiveInt | None = setting(None)
    """Most optimizer steps, a limit and no length as in TRL; none: no limit."""
    gradient_checkpointing: bool = unkeyed(False, "Less memory, more time.")
    save_steps: PositiveInt = advanced_unkeyed(25, SAVE_STEPS)
    report_to: list[Literal["tensorboard"]] = unkeyed([], "Trackers that get the logs.")
    prompt: PromptSection | None = advanced(None, "In place of the section `prompt`.")


class SftSection(TrainSection):
    start_from: Literal["init", "rl"] = advanced("init")
    """Adapter to start from; rl: the paper's reversed order."""
    data: Literal["system1", "all"] = setting("system1")
    """Rows to train on; undecided ones are never used."""
    system2_share: Share = setting(0.0)
    """Cold start for RL: System 2 rows to add, as a share of the number of System 1 rows."""
    system1_targets: Literal["full", "answer"] = advanced("full")
    """full: the response; answer: the final answer alone, where a row has one."""
    batch_size: PositiveInt = setting(32, "Rows per optimizer step.")
    per_device_train_batch_size: PositiveInt = setting(8, "Rows per forward pass; must divide batch_size.")
    lora_dropout: ShareBelowOne = advanced(0.05, DROPOUT)

    def conflicts(self, registries: Mapping[str, Any]) -> Iterator[str]:
        if self.batch_size % self.per_device_train_batch_size:
            yield (
                f"per_device_train_batch_size {self.per_device_train_batch_size} does not divide "
                f"batch_size {self.batch_size}"
            )
