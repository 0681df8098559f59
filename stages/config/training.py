"""Score, partition, SFT and baselines, and what SFT and RL have in common."""

from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, model_validator

from stages.config.fields import Section, named, setting
from stages.config.sources import PromptSection

AutoOff = Annotated[Literal["auto", "off"], BeforeValidator(lambda value: "off" if value is False else value)]
"""YAML reads a bare `off` as false."""
Scorer = Annotated[str, named("scorers")]
Strategy = Annotated[str, named("strategies")]

OPTIMIZERS = {"adamw": "adamw_torch_fused", "adafactor": "adafactor", "adamw_8bit": "adamw_bnb_8bit"}
"""Our names and those of transformers. Each can update every element by itself, as it must, because active
elements are packed into one-dimensional parameters."""
MATRIX_WISE = ("muon", "galore", "lomo", "apollo", "shampoo", "soap", "lorafa", "riemannian", "dion")
Tracker = Literal["tensorboard", "trackio", "wandb", "mlflow"]


def _element_wise(name: str) -> str:
    if any(part in name.lower().replace("-", "").replace("_", "") for part in MATRIX_WISE):
        raise ValueError(
            f"{name} works on whole matrices, and lorapar trains single elements; use {', '.join(OPTIMIZERS)}"
        )
    if name not in OPTIMIZERS:
        raise ValueError(f"unknown optimizer {name!r}; choose from: {', '.join(OPTIMIZERS)}")
    return name


Optimizer = Annotated[str, AfterValidator(_element_wise)]


class LaunchSection(Section):
    backend: Literal["single", "ddp", "fsdp2", "zero2"] = setting(
        "single",
        "single: one process; ddp: several, each with the whole model; fsdp2: several, each with a part of "
        "every layer of the base and the whole adapter; zero2 is refused: it divides what takes little room.",
    )
    processes: int | None = setting(None, "Processes on this machine; none: one for each GPU.", gt=0, le=1024)
    config: str | None = setting(
        None, "Your own accelerate config file, e.g. for several machines; it decides everything else."
    )

    @property
    def several(self) -> bool:
        return self.backend != "single" or self.config is not None

    @property
    def divides(self) -> bool:
        """Whether each process is to hold a part of the base."""
        return self.backend == "fsdp2" and self.config is None


LAUNCH = "How many processes run the stage."


class BaselineSection(Section):
    method: Literal[
        "prompt_tuning", "p_tuning", "prefix_tuning", "ia3", "dora", "miss", "randlora", "shira", "vera"
    ] = setting(
        ...,
        "Method, by PEFT. Those from dora on take lora.target_modules, and dora lora_alpha and use_rslora.",
    )
    virtual_tokens: int = setting(20, "Length of the trained prompt or prefix, in tokens.", gt=0)
    encoder_hidden: int | None = setting(None, "Width of p_tuning's encoder; none: that of the model.", gt=0)
    rank: int | None = setting(
        None, "Rank of dora, miss, randlora, shira and vera; none: lora.r, but 256 for vera.", gt=0
    )

    @property
    def trains_prompt(self) -> bool:
        return self.method in ("prompt_tuning", "p_tuning", "prefix_tuning")


class ScoreSection(Section):
    scorer: Scorer = setting("taylor2", "Importance formula.")
    examples: int = setting(100, "Examples per system.", gt=0)
    batch_size: int = setting(8, "Examples per forward pass.", in_cache_key=False, gt=0)
    launch: LaunchSection = setting(LaunchSection(), LAUNCH, in_cache_key=False)
    prompt: PromptSection | None = setting(None, "Overrides `prompt`.")


BY_DENSITY = ("topk", "random_half")
BY_THETA = ("importance", "random", "random_within", "swapped", "complement")
"""Strategies, by what says how many elements they take."""


class PartitionSection(Section):
    strategy: Strategy = setting("importance", "How the elements are split.")
    theta: float = setting(
        0.9,
        "Share of a system's total importance that its most important elements must reach.",
        ignored_by=("all", *BY_DENSITY),
        gt=0,
        le=1,
    )
    density: float = setting(
        0.5,
        "Share of all elements that strategy topk takes for each system, and random_half in all.",
        ignored_by=("all", *BY_THETA),
        gt=0,
        le=1,
    )
    alpha: float = setting(
        1, "Share of the shared elements that SFT trains.", ignored_by="partition:rl", ge=0, le=1
    )
    beta: float = setting(
        1, "Share of the shared elements that RL trains.", ignored_by="partition:sft", ge=0, le=1
    )


class TrainSection(Section):
    learning_rate: float = setting(2e-4, "Peak learning rate.", gt=0)
    optim: Optimizer = setting(
        "adamw", f"One of {', '.join(OPTIMIZERS)} (the last needs bitsandbytes and a GPU)."
    )
    loraplus_lr_ratio: float | None = setting(None, "LoRA+: learning rate of B over that of A.", gt=0)
    lr_scheduler_type: Literal["cosine", "linear", "constant"] = setting("cosine", "Learning rate schedule.")
    warmup_ratio: float = setting(
        0.03, "Share of the steps in which the rate rises; the last of these has the peak rate.", ge=0, lt=1
    )
    weight_decay: float = setting(0.0, "Weight decay.", ge=0)
    adam_beta1: float = setting(0.9, "AdamW β₁.", ge=0, lt=1)
    adam_beta2: float = setting(0.999, "AdamW β₂.", ge=0, lt=1)
    max_grad_norm: float = setting(1.0, "Gradients are clipped to this norm.", gt=0)
    num_train_epochs: float = setting(1, "Passes over the data.", gt=0, le=1e6)
    max_steps: int | None = setting(None, "Stop after this many optimizer steps; none: after epochs.", gt=0)
    gradient_checkpointing: bool = setting(
        False, "Recompute activations in the backward pass: less memory, more time.", in_cache_key=False
    )
    save_steps: int = setting(
        25,
        "Optimizer steps between checkpoints; a killed run continues from the last one.",
        in_cache_key=False,
        gt=0,
    )
    launch: LaunchSection = setting(LaunchSection(), LAUNCH, in_cache_key=False)
    report_to: list[Tracker] = setting(
        [], "Trackers that get every logged step; each needs its package.", in_cache_key=False
    )
    prompt: PromptSection | None = setting(None, "Overrides `prompt`.")


class SftSection(TrainSection):
    start_from: Literal["init", "rl"] = setting(
        "init", "Adapter to start from; rl is the paper's reversed order."
    )
    data: Literal["system1", "all"] = setting("system1", "Rows to train on. Undecided rows are never used.")
    system2_share: float = setting(
        0.0, "Cold start for RL: number of System 2 rows added, as a share of the System 1 rows.", ge=0, le=1
    )
    system1_targets: Literal["full", "answer"] = setting(
        "full",
        "What System 1 rows teach: their responses, or only the final answer, at once (rows without a "
        "verifiable answer keep their responses).",
    )
    loss_type: Literal["nll", "dft"] = setting(
        "nll", "nll, or dft: each token's loss is weighted by its probability (arXiv 2508.05629)."
    )
    batch_size: int = setting(32, "Rows per optimizer step.", gt=0)
    per_device_train_batch_size: int = setting(8, "Rows per forward pass; divides batch_size.", gt=0)
    lora_dropout: float = setting(
        0.05, "Dropout of what goes into the adapter; shira, ia3 and prompts have none.", ge=0, lt=1
    )
    padding_free: AutoOff = setting(
        "auto",
        "Compute a micro batch as one row without padding, where the architecture allows it; "
        "off: TRL's own way.",
    )

    @model_validator(mode="after")
    def _divides(self) -> "SftSection":
        if self.batch_size % self.per_device_train_batch_size:
            raise ValueError(
                f"per_device_train_batch_size {self.per_device_train_batch_size} does not divide "
                f"batch_size {self.batch_size}"
            )
        return self
