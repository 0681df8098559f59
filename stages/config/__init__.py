"""All settings as pydantic models, one class per section.

The description of a field, in its declaration or below it, is its only documentation; `lorapar config` prints
it. A setting declared with `in_cache_key=False` does not enter the keys of artifacts: it changes no result,
or a digest of what it names is in the key. `loading.py` reads files into these models.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from stages.config.evaluation import (
    TRAINED,
    UNTRAINED_TARGETS,
    BenchmarkSection,
    EvalSection,
    SandboxSection,
    split_target,
)
from stages.config.fields import Section, setting
from stages.config.labels import UNVOTED, ClassifySection, ServerSection, ThinkingSection, Voter
from stages.config.modes import AUTO, FAST, MODES, SLOW, ModesSection, prompt_under
from stages.config.rl import RlSection
from stages.config.sources import DataSection, LoraSection, ModelSection, PromptSection, SourceSection
from stages.config.training import (
    BaselineSection,
    LaunchSection,
    PartitionSection,
    ScoreSection,
    SftSection,
    TrainSection,
)


class Config(Section):
    run: str = setting("default", in_cache_key=False, pattern=r"^[\w][\w.-]*$")
    """Name of the run; its artifacts are in the folder of this name in runs_dir."""
    runs_dir: str = setting("runs", "Folder of all runs.", in_cache_key=False)
    seed: int = setting(41, ge=0)
    """Seed of the initial adapter, the sampling of rows, random masks and training."""
    model: ModelSection = setting(..., "The base model.")
    data: DataSection = setting(DataSection(), "The training rows.")
    prompt: PromptSection = setting(PromptSection())
    """How score, sft, rl and eval format a question as a prompt."""
    modes: ModesSection | None = setting(None)
    """Messages under which the model answers at once (fast), works it out (slow), or decides that (auto)."""
    lora: LoraSection = setting(LoraSection(), "The adapter.")
    baseline: BaselineSection | None = setting(None, advanced=True)
    """PEFT method to train in place of LoRA, with all its parameters; score and partition are skipped."""
    server: ServerSection = setting(ServerSection(), advanced=True)
    """Servers and batches of the models that vote or are evaluated."""
    classify: ClassifySection = setting(ClassifySection(), "Labelling of examples as System 1 or System 2.")
    score: ScoreSection = setting(ScoreSection(), "Importance scores of all LoRA elements.")
    partition: PartitionSection = setting(PartitionSection())
    """Split of the LoRA elements between the two systems."""
    sft: SftSection = setting(SftSection())
    """Supervised fine-tuning of System 1's elements."""
    rl: RlSection = setting(RlSection(), "GRPO on the System 2 elements.")
    launch: LaunchSection = setting(LaunchSection(), "How sft and rl are run.", advanced=True)
    eval: EvalSection = setting(EvalSection(), "Evaluation of the base model and the adapters on benchmarks.")

    def conflicts(self, registries: Mapping[str, Any]) -> Iterator[str]:
        def has_trait(kind: str, name: str, trait: str) -> bool:
            return bool(registries) and registries[kind].has_trait(name, trait)

        reads_scores = not has_trait("strategies", self.partition.strategy, "unscored")
        is_zero = self.lora.init == "default" and has_trait("scorers", self.score.scorer, "product")
        if is_zero and (reads_scores or self.partition.protect):
            yield ("lora.init default has B = 0, so every importance is zero; choose normal, pissa or olora")
        partition = self.partition
        if not reads_scores and (partition.alpha, partition.beta) != (1, 1):
            yield (  # without scores there are no top shared elements to choose
                f"partition.strategy {partition.strategy} trains all shared elements, got alpha "
                f"{partition.alpha}, beta {partition.beta}; set both to 1"
            )
        if "init" not in (self.sft.start_from, self.rl.start_from):
            yield (
                "sft and rl start from each other; "
                "the reversed order is sft.start_from=rl with rl.start_from=init"
            )
        defaults = {"data": "system1", "system2_share": 0, "system1_targets": "full"}
        changed = [f"sft.{name}" for name in defaults if getattr(self.sft, name) != defaults[name]]
        if self.modes and changed:
            yield f"modes say what SFT learns from; leave out {', '.join(changed)}"
        if self.modes and self.rl.too_long == "truncate_left":
            yield "rl.too_long truncate_left would cut the message of a mode; use drop"
        if in_mode := [target for target in self.eval.targets if ":" in target and not self.modes]:
            yield f"eval.targets: {in_mode[0]} is asked in a mode, and there is no section modes"
        if self.baseline is not None:
            yield from self._conflicts_of_baseline(self.baseline.method)
        if self.model.load_in_4bit:
            yield from self._conflicts_of_4bit()

    def _conflicts_of_baseline(self, method: str) -> Iterator[str]:
        subject = f"baseline {method}"
        if self.partition.protect:
            yield f"{subject} is trained whole; leave out partition.protect"
        if "init" in self.eval.weights:
            yield f"{subject} has no scored initial adapter; take init out of eval.targets"
        if self._uses_vllm:
            yield f"vllm cannot serve {subject}; use engine transformers"
        checkpointing = self.sft.gradient_checkpointing or self.rl.gradient_checkpointing
        if method == "prefix_tuning" and checkpointing:
            yield f"{subject} does not train under gradient_checkpointing, which drops the prefix"
        if self.rl.beta and self.rl.kl_reference not in ("auto", "base"):
            yield f"{subject} can hold on to the base alone; use rl.kl_reference=base"

    def _conflicts_of_4bit(self) -> Iterator[str]:
        subject = "model.load_in_4bit"
        if self.baseline is not None:
            yield f"{subject} is for LoRA: TRL would round baseline {self.baseline.method} to bfloat16"
        if self.lora.init not in ("normal", "default"):
            yield f"{subject}: PEFT cannot make init {self.lora.init} over 4 bits; use normal"
        if self._uses_vllm:
            yield f"{subject}: what vllm would serve has other base weights; use engine transformers"

    @property
    def _uses_vllm(self) -> bool:
        return self.eval.engine == "vllm" or self.rl.rollouts.engine != "transformers"

    @property
    def served_by_vllm(self) -> bool:
        return self.baseline is None and not self.model.load_in_4bit

    def prompt_of(self, target: str) -> PromptSection:
        """Return the prompt that a trained target learned under: `sft` or `rl`."""
        return getattr(self, target).prompt or self.prompt

    def labelling_strategy(self, rows: str) -> str:
        """Return the labelling strategy of the training rows (`train`) or of a benchmark's items."""
        benchmark = self.eval.benchmarks.get(rows)
        return "known" if benchmark and benchmark.brings_labels else self.classify.strategy

    @property
    def root(self) -> Path:
        return Path(self.runs_dir) / self.run
