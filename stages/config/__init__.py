"""All settings as pydantic models, one class per section.

The description of a field is its only documentation; `lorapar config` prints it. A setting declared with
`in_cache_key=False` does not enter the keys of artifacts: it changes no result, or a digest of what it names
is in the key. `yaml.py` reads YAML into these models.
"""

from pathlib import Path

from pydantic import ValidationInfo, model_validator

from stages.config.evaluation import KEPT as KEPT
from stages.config.evaluation import REGIONS as REGIONS
from stages.config.evaluation import ROUTED as ROUTED
from stages.config.evaluation import TRAINED as TRAINED
from stages.config.evaluation import UNTRAINED_TARGETS as UNTRAINED_TARGETS
from stages.config.evaluation import BenchmarkSection, EvalSection, SandboxSection
from stages.config.fields import Section, registries_from, setting
from stages.config.labels import UNVOTED as UNVOTED
from stages.config.labels import ClassifySection, ServerSection, ThinkingSection, Voter
from stages.config.rl import RlSection
from stages.config.sources import DataSection, LoraSection, ModelSection, PromptSection, SourceSection
from stages.config.training import SECOND_SFT as SECOND_SFT
from stages.config.training import (
    BaselineSection,
    LaunchSection,
    PartitionSection,
    ScoreSection,
    SftSection,
    TrainSection,
)

__all__ = [
    "BaselineSection",
    "BenchmarkSection",
    "ClassifySection",
    "Config",
    "DataSection",
    "EvalSection",
    "LaunchSection",
    "LoraSection",
    "ModelSection",
    "PartitionSection",
    "PromptSection",
    "RlSection",
    "SandboxSection",
    "ScoreSection",
    "Section",
    "ServerSection",
    "SftSection",
    "SourceSection",
    "ThinkingSection",
    "TrainSection",
    "Voter",
]


class Config(Section):
    run: str = setting(
        "default",
        "Name of the run; its artifacts are in the folder of this name in runs_dir.",
        in_cache_key=False,
        pattern=r"^[\w][\w.-]*$",
    )
    runs_dir: str = setting("runs", "Folder of all runs.", in_cache_key=False)
    seed: int = setting(
        41, "Seed of the initial adapter, the sampling of rows, random masks and training.", ge=0
    )
    model: ModelSection = setting(..., "The base model.")
    data: DataSection = setting(DataSection(), "The training rows.")
    prompt: PromptSection = setting(
        PromptSection(), "How score, sft, rl and eval format a question as a prompt."
    )
    lora: LoraSection = setting(LoraSection(), "The adapter.")
    baseline: BaselineSection | None = setting(
        None,
        "PEFT method to train in place of LoRA, with all its parameters; score and partition are skipped.",
        advanced=True,
    )
    server: ServerSection = setting(
        ServerSection(), "Servers and batches of the models that vote or are evaluated.", advanced=True
    )
    classify: ClassifySection = setting(ClassifySection(), "Labelling of examples as System 1 or System 2.")
    score: ScoreSection = setting(ScoreSection(), "Importance scores of all LoRA elements.")
    partition: PartitionSection = setting(
        PartitionSection(), "Split of the LoRA elements between the two systems."
    )
    sft: SftSection = setting(
        SftSection(), "Supervised fine-tuning of System 1's elements, and in a second round of System 2's."
    )
    rl: RlSection = setting(RlSection(), "GRPO on the System 2 elements.")
    eval: EvalSection = setting(EvalSection(), "Evaluation of the base model and the adapters on benchmarks.")

    @model_validator(mode="after")
    def _check_importance_is_not_zero(self, info: ValidationInfo) -> "Config":
        registries = registries_from(info)
        if not registries:
            return self
        unscored = registries["strategies"].has_trait(self.partition.strategy, "unscored")
        if unscored and not self.partition.protect:
            return self
        if self.lora.init == "default" and registries["scorers"].has_trait(self.score.scorer, "product"):
            raise ValueError(
                "lora.init default has B = 0, so every importance is zero; "
                "choose normal, pissa, olora or orthogonal"
            )
        return self

    @model_validator(mode="after")
    def _check_order(self) -> "Config":
        if self.sft.start_from == "rl" and self.rl.start_from == "sft":
            raise ValueError(
                "sft and rl start from each other; "
                "the reversed order is sft.start_from=rl with rl.start_from=init"
            )
        return self

    @model_validator(mode="after")
    def _check_second_sft(self) -> "Config":
        if "sft2" in self.eval.targets and self.sft.rounds == 1:
            raise ValueError("eval.targets: sft2 is the adapter of a second round of SFT; set sft.rounds=2")
        return self

    @model_validator(mode="after")
    def _check_port(self) -> "Config":
        voters = [v for v in self.classify.voters if not v.base_url and v.engine != "transformers"]
        if self.server.port and len({voter.devices or "" for voter in voters}) > 1:
            raise ValueError(
                "server.port: voters with devices have servers of their own, side by side, and these cannot "
                "share a port; leave server.port out"
            )
        return self

    @model_validator(mode="after")
    def _check_routed_prompts(self) -> "Config":
        prompts = [benchmark.prompt or self.prompt for benchmark in self.eval.benchmarks.values()]
        if ROUTED in self.eval.targets and any(prompt.by_system for prompt in prompts):
            raise ValueError(
                "eval.targets: auto must find the system of an item, and prompt.by_system tells it to the "
                "model; leave out one of them, for example by a prompt of the benchmark's own"
            )
        return self

    @model_validator(mode="after")
    def _check_rescore(self, info: ValidationInfo) -> "Config":
        registries = registries_from(info)
        if registries and registries["scorers"].has_trait(self.score.scorer, "rollouts"):
            raise ValueError(
                f"score.scorer {self.score.scorer} needs completions of SFT's adapter, and score runs "
                f"before SFT; set rl.rescore={self.score.scorer} for RL's elements"
            )
        if not self.rl.rescore:
            return self
        unscored = registries and registries["strategies"].has_trait(self.partition.strategy, "unscored")
        for conflict, why in (
            (self.rl.start_from != "sft", "rl starts from the initial adapter"),
            (self.sft.rounds == 2, "the second round of SFT trains the same elements before it"),
            (self.baseline is not None, "a baseline is trained whole"),
            (bool(unscored), f"strategy {self.partition.strategy} reads no scores"),
        ):
            if conflict:
                raise ValueError(f"rl.rescore scores the adapter of SFT for RL, and {why}")
        by_rollouts = registries and registries["scorers"].has_trait(self.rl.rescore, "rollouts")
        sleeps = self.rl.dynamic_sampling and self.rl.rollouts.enable_sleep_mode
        if by_rollouts and sleeps and self.score.launch.backend == "fsdp2":
            raise ValueError(
                f"rl.rescore {self.rl.rescore} runs RL's rollouts in score.launch, whose backend fsdp2 does "
                "not go with rl.dynamic_sampling and rl.rollouts.enable_sleep_mode; use ddp"
            )
        return self

    @model_validator(mode="after")
    def _check_kept(self) -> "Config":
        for target in self.eval.targets:
            if target.startswith(KEPT) and int(target.removeprefix(KEPT)) not in self.rl.keep_steps:
                raise ValueError(
                    f"target {target}: RL keeps that adapter only if rl.keep_steps names the step, got "
                    f"{self.rl.keep_steps}"
                )
        return self

    @model_validator(mode="after")
    def _check_baseline(self) -> "Config":
        if self.baseline is None:
            return self
        subject = f"baseline {self.baseline.method}"
        if self.partition.protect:
            raise ValueError(f"{subject} is trained whole; leave out partition.protect")
        if scored := [target for target in self.eval.targets if target in ("init", *REGIONS)]:
            raise ValueError(f"{subject} has no scored initial adapter; take {scored[0]} out of eval.targets")
        if self.eval.engine == "vllm" or self.rl.rollouts.engine != "transformers":
            raise ValueError(f"vllm cannot serve {subject}; use engine transformers")
        if self.sft.loraplus_lr_ratio or self.rl.loraplus_lr_ratio:
            raise ValueError(f"{subject} has no LoRA factors; leave out loraplus_lr_ratio")
        checkpointing = self.sft.gradient_checkpointing or self.rl.gradient_checkpointing
        if self.baseline.method == "dora" and self.rl.launch.backend == "fsdp2":
            raise ValueError(f"{subject} needs whole weights for the copy that RL starts from; use ddp")
        if self.baseline.method == "prefix_tuning" and checkpointing:
            raise ValueError(f"{subject} does not train under gradient_checkpointing, which drops the prefix")
        if self.rl.beta and self.rl.kl_reference == "sft":
            raise ValueError(f"{subject} can hold on to the base alone; use rl.kl_reference=base")
        return self

    @model_validator(mode="after")
    def _check_4bit(self) -> "Config":
        if not self.model.load_in_4bit:
            return self
        subject = "model.load_in_4bit"
        if self.baseline is not None:
            raise ValueError(
                f"{subject} is for LoRA: TRL would round baseline {self.baseline.method} to bfloat16"
            )
        if self.lora.init not in ("normal", "default"):
            raise ValueError(f"{subject}: PEFT cannot make init {self.lora.init} over 4 bits; use normal")
        if sharded := [s for s in ("score", "sft", "rl") if getattr(self, s).launch.backend == "fsdp2"]:
            raise ValueError(f"{subject}: {sharded[0]}.launch.backend fsdp2 cannot divide 4 bits; use ddp")
        if self.eval.engine == "vllm" or self.rl.rollouts.engine != "transformers":
            raise ValueError(
                f"{subject}: what vllm would serve has other base weights; use engine transformers"
            )
        return self

    @property
    def served_by_vllm(self) -> bool:
        """True if vLLM can serve the trained model."""
        return self.baseline is None and not self.model.load_in_4bit

    def labelling_strategy(self, rows: str) -> str:
        """Return the labelling strategy of the training rows (`train`) or of a benchmark's items."""
        benchmark = self.eval.benchmarks.get(rows)
        return "known" if benchmark and benchmark.brings_labels else self.classify.strategy

    @property
    def root(self) -> Path:
        """Folder of the run."""
        return Path(self.runs_dir) / self.run
