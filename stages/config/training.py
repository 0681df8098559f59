"""Settings of score, partition, SFT and baselines, and those that SFT and RL share."""

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, NonNegativeFloat, PositiveFloat, PositiveInt

from stages.config.fields import (
    PositiveShare,
    Section,
    Share,
    ShareBelowOne,
    advanced,
    advanced_unkeyed,
    registry_name,
    setting,
    unkeyed,
)
from stages.config.sources import PromptSection

AutoOff = Annotated[Literal["auto", "off"], BeforeValidator(lambda value: "off" if value is False else value)]
"""`auto` or `off`; also false, because YAML reads a bare `off` as false."""
Strategy = Annotated[str, registry_name("strategies")]

OPTIMIZERS = {"adamw": "adamw_torch_fused", "adamw_8bit": "adamw_bnb_8bit"}
"""Values of `optim` and their names in transformers. Each updates elements independently, which is necessary
because the active elements of a weight are packed into a one-dimensional parameter."""
MATRIX_WISE = (
    "muon", "adafactor", "galore", "lomo", "apollo", "shampoo", "soap", "lorafa", "riemannian", "dion",
)  # fmt: skip
"""Optimizers that need whole matrices; they are refused with the reason. Adafactor is one of them: it keeps
averages of rows and columns, and of a one-dimensional parameter a whole second moment, so both its updates
and its memory would differ from what the name promises."""
Tracker = Literal["tensorboard", "trackio", "wandb", "mlflow"]


def _check_optimizer(name: str) -> str:
    normalized = name.lower().replace("-", "").replace("_", "")
    if any(matrix_wise in normalized for matrix_wise in MATRIX_WISE):
        raise ValueError(
            f"{name} works on whole matrices, and lorapar trains single elements; use {', '.join(OPTIMIZERS)}"
        )
    if name not in OPTIMIZERS:
        raise ValueError(f"unknown optimizer {name!r}; choose from: {', '.join(OPTIMIZERS)}")
    return name


Optimizer = Annotated[str, AfterValidator(_check_optimizer)]


SECOND_SFT = "sft:system2"
"""Step that trains System 2's elements by SFT, from the adapter of step `sft`."""


class BaselineSection(Section):
    method: Literal["prompt_tuning", "p_tuning", "prefix_tuning", "ia3"] = setting(...)
    """PEFT method. dora, miss, randlora, shira and vera use lora.target_modules; dora also uses
    lora.lora_alpha and lora.use_rslora."""
    virtual_tokens: PositiveInt = advanced(20, "Length of the trained prompt or prefix, in tokens.")
    encoder_hidden: PositiveInt | None = advanced(None)
    """Hidden size of p_tuning's prompt encoder; none: that of the model."""
    rank: PositiveInt | None = advanced(None)
    """Rank of dora, miss, randlora, shira and vera; none: lora.r, but 256 for vera."""

    @property
    def trains_prompt(self) -> bool:
        """True if the method trains a soft prompt or prefix."""
        return self.method in ("prompt_tuning", "p_tuning", "prefix_tuning")


WARMUP = "Share of the steps in which the learning rate rises; the last of them has the peak rate."
SAVE_STEPS = "Optimizer steps between checkpoints; a killed run continues from the last one."
DROPOUT = "Dropout on the input of the adapter; shira, ia3 and the prompt methods have none."


class ScoreSection(Section):
    scorer: Annotated[str, registry_name("scorers")] = setting("taylor2")
    """Importance formula, one of `lorapar list scorers`."""
    examples: PositiveInt = setting(100, "Number of examples of each system.")
    batch_size: PositiveInt = unkeyed(8, "Examples per forward pass; halved if memory runs out.")
    prompt: PromptSection | None = advanced(None)
    """Prompt settings of this stage, used instead of the section `prompt`."""


BY_DENSITY = ("topk", "topk_within", "random_half")
"""Strategies whose number of elements follows from `density`."""
BY_SCORE = ("importance", "topk", "topk_within")
"""Strategies that give a system the elements with its highest scores."""
BY_THETA = ("importance", "random", "random_within", "swapped", "complement")
"""Strategies whose number of elements follows from `theta`."""


of_rl = partial(setting, ignored_by="partition:sft")
advanced_of_rl = partial(advanced, ignored_by="partition:sft")
"""Settings that do not choose the elements of SFT."""


class PartitionSection(Section):
    strategy: Strategy = setting("importance")
    """How the elements are split between the systems, one of `lorapar list strategies`."""
    theta: PositiveShare = setting(0.9, ignored_by=("all", *BY_DENSITY))
    """θ: a system gets its most important elements until they have this share of its total importance."""
    density: PositiveShare = advanced(0.5, ignored_by=("all", *BY_THETA))
    """Share of all elements that topk and topk_within take for each system, and random_half in total."""
    alpha: Share = setting(1, ignored_by="partition:rl")
    """α: share that SFT trains of the elements that both systems have."""
    beta: Share = of_rl(1)
    """β: share that RL, or a second round of SFT, trains of the elements that both systems have."""
    rl_elements: Literal["system2", "not_system1", "all", "random_within"] = advanced_of_rl("system2")
    """Elements that RL, or a second round of SFT, trains. system2: those that System 2 alone has, and beta of
    the shared ones; not_system1: all that System 1 does not have, so that no element of System 1's set moves;
    all; random_within: as many of each LoRA weight as with system2, drawn at random, as a control."""
    rl_density: PositiveShare | None = advanced_of_rl(None)
    """Share of all elements that RL trains, those with System 2's highest scores whatever System 1 has; none:
    as many as strategy and beta give it."""

    def _conflicts_of_rl_density(self) -> Iterator[str]:
        if self.rl_density is None:
            return
        if self.rl_elements in ("not_system1", "all"):
            yield (f"rl_density takes System 2's elements, and rl_elements {self.rl_elements} takes others")
        if self.strategy not in BY_SCORE:
            yield (
                f"rl_density takes System 2's highest scores, and strategy {self.strategy} does not; choose "
                f"{', '.join(BY_SCORE)}"
            )

    def conflicts(self, registries: Mapping[str, Any]) -> Iterator[str]:
        yield from self._conflicts_of_rl_density()


class TrainSection(Section):
    learning_rate: PositiveFloat = setting(2e-4, "Peak learning rate.")
    optim: Optimizer = advanced(
        "adamw", f"Optimizer, one of {', '.join(OPTIMIZERS)} (the last needs bitsandbytes and a GPU)."
    )
    loraplus_lr_ratio: PositiveFloat | None = advanced(None)
    """LoRA+: ratio of the learning rate of B to that of A; none: the same rate."""
    lr_scheduler_type: Literal["cosine", "linear", "constant"] = advanced("cosine")
    """Learning rate schedule after the warmup."""
    warmup_ratio: ShareBelowOne = advanced(0.03, WARMUP)
    weight_decay: NonNegativeFloat = advanced(0.0, "Weight decay.")
    adam_beta1: ShareBelowOne = advanced(0.9, "AdamW β₁.")
    adam_beta2: ShareBelowOne = advanced(0.999, "AdamW β₂.")
    max_grad_norm: PositiveFloat = advanced(1.0, "Norm to which gradients are clipped.")
    num_train_epochs: float = setting(1, "Number of passes over the training rows.", gt=0, le=1e6)
    max_steps: PositiveInt | None = setting(None)
    """At most this many optimizer steps, if num_train_epochs needs more; none: no limit."""
    gradient_checkpointing: bool = unkeyed(False)
    """Recompute activations in the backward pass: less memory, more time."""
    save_steps: PositiveInt = advanced_unkeyed(25, SAVE_STEPS)
    report_to: list[Tracker] = unkeyed([])
    """Experiment trackers that receive the logs; the package of each must be installed."""
    prompt: PromptSection | None = advanced(None)
    """Prompt settings of this stage, used instead of the section `prompt`."""


of_first_round = partial(setting, ignored_by=SECOND_SFT)
advanced_of_first_round = partial(advanced, ignored_by=SECOND_SFT)
"""Settings of the first round of SFT alone."""


class SftSection(TrainSection):
    rounds: Literal[1, 2] = unkeyed(1)
    """1: System 1's elements on System 1 rows; 2: then, with the same settings, System 2's elements on System
    2 rows, for rows whose answers no reward can verify. RL starts from the last round."""
    start_from: Literal["init", "rl"] = advanced_of_first_round("init")
    """Adapter to start from: init, or rl for the paper's reversed order."""
    data: Literal["system1", "all"] = of_first_round("system1")
    """Rows to train on: System 1 or all. Undecided rows are never used."""
    system2_share: Share = of_first_round(0.0)
    """Cold start for RL: number of System 2 rows to add, as a share of the number of System 1 rows."""
    system1_targets: Literal["full", "answer"] = advanced_of_first_round("full")
    """Target of System 1 rows. full: the response; answer: the final answer alone, without reasoning (rows
    without a verifiable answer keep their responses)."""
    loss_type: Literal["nll", "dft"] = advanced("nll")
    """nll: cross-entropy; dft: cross-entropy with each token weighted by its probability (arXiv
    2508.05629)."""
    batch_size: PositiveInt = setting(32, "Rows per optimizer step.")
    per_device_train_batch_size: PositiveInt = setting(8, "Rows per forward pass; must divide batch_size.")
    lora_dropout: ShareBelowOne = advanced(0.05, DROPOUT)
    padding_free: AutoOff = advanced("auto")
    """auto: compute a micro-batch as one row without padding if the architecture allows it; off: with TRL's
    padding."""

    def conflicts(self, registries: Mapping[str, Any]) -> Iterator[str]:
        if self.batch_size % self.per_device_train_batch_size:
            yield (
                f"per_device_train_batch_size {self.per_device_train_batch_size} does not divide "
                f"batch_size {self.batch_size}"
            )
        if self.rounds == 2 and self.data == "all":
            yield "data all trains on both systems in one round; rounds 2 goes with data system1"
