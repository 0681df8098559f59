"""Score, partition, SFT and RL, and baselines."""

from functools import partial
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, ValidationInfo, model_validator

from stages.config.evaluation import SandboxSection
from stages.config.fields import Section, WithoutFalse, known, named, refuse, setting
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
        "single", "single: one process; the others: several processes that work together."
    )
    processes: int | None = setting(None, "Processes on this machine; none: one for each GPU.", gt=0)
    config: str | None = setting(
        None, "Your own accelerate config file, e.g. for several machines; it decides everything else."
    )

    @property
    def several(self) -> bool:
        return self.backend != "single" or self.config is not None


LAUNCH = "How many processes run the stage."


class BaselineSection(Section):
    method: Literal["prompt_tuning", "p_tuning", "prefix_tuning", "ia3"] = setting(..., "Method, by PEFT.")
    virtual_tokens: int = setting(
        20, "Length of the trained prompt or prefix, in tokens (not for ia3).", gt=0
    )
    encoder_hidden: int | None = setting(None, "Width of p_tuning's encoder; none: that of the model.", gt=0)


class ScoreSection(Section):
    scorer: Scorer = setting("taylor2", "Importance formula.")
    examples: int = setting(100, "Examples per system.", gt=0)
    batch_size: int = setting(8, "Examples per forward pass.", identity=False, gt=0)
    launch: LaunchSection = setting(LaunchSection(), LAUNCH, identity=False)
    prompt: PromptSection | None = setting(None, "Overrides `prompt`.")


class PartitionSection(Section):
    strategy: Strategy = setting("importance", "How the elements are split.")
    theta: float = setting(
        0.9, "Share of a system's total importance that its most important elements must reach.", gt=0, le=1
    )
    alpha: float = setting(
        1, "Share of the shared elements that SFT trains.", not_for="partition:rl", ge=0, le=1
    )
    beta: float = setting(
        1, "Share of the shared elements that RL trains.", not_for="partition:sft", ge=0, le=1
    )


class TrainSection(Section):
    lr: float = setting(2e-4, "Peak learning rate.", gt=0)
    optimizer: Optimizer = setting(
        "adamw", f"One of {', '.join(OPTIMIZERS)} (the last needs bitsandbytes and a GPU)."
    )
    loraplus_ratio: float | None = setting(None, "LoRA+: learning rate of B over that of A.", gt=0)
    scheduler: Literal["cosine", "linear", "constant"] = setting("cosine", "Learning rate schedule.")
    warmup: float = setting(
        0.03, "Share of the steps in which the rate rises; the last of these has the peak rate.", ge=0, lt=1
    )
    weight_decay: float = setting(0.0, "Weight decay.", ge=0)
    adam_beta1: float = setting(0.9, "AdamW β₁.", ge=0, lt=1)
    adam_beta2: float = setting(0.999, "AdamW β₂.", ge=0, lt=1)
    max_grad_norm: float = setting(1.0, "Gradients are clipped to this norm.", gt=0)
    epochs: float = setting(1, "Passes over the data.", gt=0, le=1e6)
    max_steps: int | None = setting(None, "Stop after this many optimizer steps; none: after epochs.", gt=0)
    gradient_checkpointing: bool = setting(
        False, "Recompute activations in the backward pass: less memory, more time.", identity=False
    )
    save_steps: int = setting(
        25,
        "Optimizer steps between checkpoints; a killed run continues from the last one.",
        identity=False,
        gt=0,
    )
    launch: LaunchSection = setting(LaunchSection(), LAUNCH, identity=False)
    report_to: list[Tracker] = setting(
        [], "Trackers that get every logged step; each needs its package.", identity=False
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
    loss: Literal["nll", "dft"] = setting(
        "nll", "nll, or dft: each token's loss is weighted by its probability (arXiv 2508.05629)."
    )
    batch_size: int = setting(32, "Rows per optimizer step.", gt=0)
    micro_batch: int = setting(8, "Rows per forward pass; divides batch_size.", gt=0)
    dropout: float = setting(0.05, "LoRA dropout.", ge=0, lt=1)
    padding_free: AutoOff = setting(
        "auto",
        "Compute a micro batch as one row without padding, where the architecture allows it; "
        "off: TRL's own way.",
    )

    @model_validator(mode="after")
    def _divides(self) -> "SftSection":
        if self.batch_size % self.micro_batch:
            raise ValueError(f"micro_batch {self.micro_batch} does not divide batch_size {self.batch_size}")
        return self


class RolloutsSection(Section):
    engine: Literal["transformers", "vllm_colocate", "vllm_server"] = setting(
        "transformers",
        "Sampling by the trainer, by vLLM on the trainer's GPUs, or by a vLLM server on other GPUs.",
    )
    base_url: str | None = setting(None, "Address of the vLLM server, without /v1.", identity=False)
    gpu_memory: float = setting(0.3, "Share of each GPU for a colocated vLLM.", identity=False, gt=0, lt=1)
    tensor_parallel: int = setting(1, "GPUs that share one colocated vLLM.", identity=False, gt=0)
    sleep: bool = setting(
        False, "Free the memory of a colocated vLLM during optimizer steps.", identity=False
    )
    correction: Literal["sequence_mask", "sequence_truncate", "token_mask", "token_truncate", "none"] = (
        setting(
            "sequence_mask",
            "Importance sampling between vLLM's probabilities and the trainer's: ratios of sequences or of "
            "tokens are masked or truncated.",
        )
    )
    correction_max: float = setting(3.0, "Ratio above which the correction masks or truncates.", gt=0)

    @model_validator(mode="after")
    def _server(self) -> "RolloutsSection":
        if (self.engine == "vllm_server") != (self.base_url is not None):
            raise ValueError("base_url goes with engine vllm_server, and only with it")
        return self


class RlSection(TrainSection):
    start_from: Literal["sft", "init"] = setting("sft", "Adapter to start from.")
    data: Literal["system2", "all"] = setting("system2", "Rows to train on. Undecided rows are never used.")
    prompts_per_step: int = setting(32, "Prompts per optimizer step.", gt=0)
    system1_share: float = setting(
        0.0,
        "Share of these prompts that are System 1 rows, replayed so that RL unlearns none of them.",
        ge=0,
        lt=1,
    )
    resample: int = setting(
        0,
        "How many times a step draws other prompts for System 2 groups whose rewards are all equal.",
        ge=0,
    )
    group: int = setting(8, "Completions per prompt.", gt=1)
    micro_batch: int = setting(8, "Completions per forward pass; divides prompts_per_step × group.", gt=0)
    shared_prompts: AutoOff = setting(
        "auto",
        "Compute each prompt once for all its completions, where the architecture allows it; "
        "off: TRL's own way.",
    )
    iterations: int = setting(1, "Optimizer passes over each batch of completions (μ).", gt=0)
    temperature: float = setting(1.0, "Sampling temperature.", gt=0)
    top_p: float = setting(1.0, "Nucleus sampling.", gt=0, le=1)
    top_k: int = setting(0, "Sample only among this many likeliest tokens; 0: among all.", ge=0)
    max_prompt: int = setting(128, "Longest prompt in tokens.", gt=0)
    too_long: Literal["error", "drop", "truncate_left"] = setting(
        "drop", "What to do with longer prompts; truncate_left keeps their last max_prompt tokens."
    )
    max_completion: int = setting(256, "Longest completion in tokens.", gt=0)
    kl_beta: float = setting(0.0, "Weight of the KL term.", ge=0)
    kl_reference: Literal["auto", "base", "sft"] = setting(
        "auto", "Reference model of the KL term; auto: sft if RL starts from there, base for a baseline."
    )
    kl_bias_correction: bool = setting(
        False, "Multiply the KL term by the importance ratio, as DeepSeek-V3.2 does and GRPO does not."
    )
    drift_prompts: int = setting(
        16,
        "System 1 prompts that RL never trains on, on which its KL divergence from its start is logged; "
        "0, or data all: none.",
        ge=0,
    )
    drift_steps: int = setting(5, "Optimizer steps between two such values.", gt=0)
    loss: Literal["grpo", "bnpo", "dr_grpo", "dapo", "cispo"] = setting(
        "dapo", "How token losses are averaged; cispo: as dapo, with clipped ratios as weights (2506.13585)."
    )
    importance_sampling: Literal["token", "sequence"] = setting(
        "token", "Ratios to the policy that sampled: of each token, or of the whole completion (GSPO)."
    )
    epsilon: float = setting(0.2, "How far a ratio may move from 1 before it is clipped.", gt=0)
    epsilon_high: float | None = setting(
        None, "The same upwards; none: epsilon. For loss cispo the largest ratio itself, e.g. 5.", gt=0
    )
    scale_rewards: Literal["group", "batch", "none"] = setting(
        "group",
        "Divide advantages by the standard deviation of the rewards in the group or batch, or not at all.",
    )
    rewards: Annotated[dict[str, float], WithoutFalse] = setting(
        {"correctness": 2.0},
        "Reward functions and their weights: names in `lorapar list rewards` or rewards_file, or trl.NAME.",
        min_length=1,
    )
    rewards_file: str | None = setting(
        None,
        "Python file with your own reward functions, with the signature that TRL expects.",
        identity=False,
    )
    sandbox: SandboxSection = setting(SandboxSection(), "For rewards that run code.", identity=False)
    rollouts: RolloutsSection = setting(RolloutsSection(), "How completions are sampled.")
    dropout: float = setting(0.0, "LoRA dropout.", ge=0, lt=1)
    save_steps: int = setting(
        5,
        "Optimizer steps between checkpoints; a killed run continues from the last one.",
        identity=False,
        gt=0,
    )
    max_equal_steps: int = setting(
        20,
        "Stop after this many steps in a row in which all rewards of each group are equal.",
        identity=False,
        gt=0,
    )

    @model_validator(mode="after")
    def _divides(self) -> "RlSection":
        if (self.prompts_per_step * self.group) % self.micro_batch:
            raise ValueError(
                f"micro_batch {self.micro_batch} does not divide {self.prompts_per_step} × {self.group}"
            )
        return self

    @model_validator(mode="after")
    def _ratios(self) -> "RlSection":
        if self.importance_sampling == "sequence" and self.loss != "grpo":
            raise ValueError(
                f"importance_sampling sequence goes with loss grpo; {self.loss} would weigh a completion by "
                "its length"
            )
        if self.loss == "cispo" and self.epsilon_high is None:
            raise ValueError("loss cispo clips the ratio itself, at epsilon_high; set it, e.g. 5")
        if self.top_p < 1 and self.rollouts.engine != "transformers":
            raise ValueError(
                f"top_p {self.top_p} with rollouts by vLLM: its probabilities are of the cut distribution, "
                "the trainer's of the whole one, and every ratio would be wrong; leave top_p at 1"
            )
        return self

    @property
    def replayed(self) -> int:
        """System 1 prompts of a step."""
        return round(self.system1_share * self.prompts_per_step)

    @model_validator(mode="after")
    def _replays(self) -> "RlSection":
        if self.system1_share and self.data == "all":
            raise ValueError("system1_share goes with data system2; data all draws from both systems")
        if self.system1_share and not 0 < self.replayed < self.prompts_per_step:
            raise ValueError(
                f"system1_share {self.system1_share} of {self.prompts_per_step} prompts is {self.replayed}; "
                "a step needs at least one prompt of each system"
            )
        alone = self.rollouts.engine == "transformers" or (
            self.rollouts.engine == "vllm_colocate" and self.rollouts.tensor_parallel == 1
        )
        if self.resample and not alone:
            raise ValueError("resample needs rollouts that each process samples for itself")
        return self

    @model_validator(mode="after")
    def _rewards(self, info: ValidationInfo) -> "RlSection":
        if registries := known(info):
            for name in self.rewards:
                refuse(partial(registries["rewards"].check, name, self.rewards_file))
        return self
