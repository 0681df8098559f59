"""Every setting, as pydantic models, one per section. A field's description is its only documentation.

A field marked `identity=False` does not change a result (or a digest stands for it) and stays out of the artifact keys.
`settings.py` reads the YAML into these models.
"""

import importlib
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator

from stages.errors import LoraparError


def _setting(default: Any, doc: str, identity: bool = True, not_for: str = "", **constraints: Any) -> Any:
    """A field; `not_for` names the one stage that reads its section and not this field."""
    return Field(default, description=doc, json_schema_extra={"identity": identity, "not_for": not_for}, **constraints)


def _named(module: str, registry: str) -> AfterValidator:
    """Check a name against a registry, imported only then."""

    def check(name: str) -> str:
        try:
            getattr(importlib.import_module(module), registry).pick(name)
        except LoraparError as error:
            raise ValueError(f"{error}; {error.hint}") from None
        return name

    return AfterValidator(check)


Scorer = Annotated[str, _named("stages.lora.importance", "scorers")]
Strategy = Annotated[str, _named("stages.lora.regions", "strategies")]
Reward = Annotated[str, _named("stages.language.rewards", "rewards")]
Persona = Annotated[str, _named("stages.language.personas", "personas")]
Benchmark = Annotated[str, _named("stages.benchmarks", "benchmarks")]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, protected_namespaces=())


class ModelSection(Section):
    name: str = _setting(..., "Base model: a local folder or a hub id.", identity=False)
    revision: str = _setting("main", "Branch, tag or commit of a hub model.", identity=False)
    dtype: Literal["auto", "float32", "bfloat16"] = _setting("auto", "Type of the base weights; auto is the checkpoint's.")
    attention: Literal["auto", "eager", "sdpa", "flash_attention_2"] = _setting(
        "auto", "Attention code; auto is the library's choice, eager is faster for short rows on CPU.", identity=False
    )


class SourceSection(Section):
    path: str | None = _setting(None, "A .jsonl or .jsonl.gz file, or a hub id.", identity=False)
    subset: str | None = _setting(None, "Configuration name of a hub data set.")
    split: str = _setting("train", "Split of a hub data set.")
    revision: str = _setting("main", "Revision of a hub data set.", identity=False)
    format: Literal["auto", "gsm8k", "alpaca", "messages", "prompt_completion"] = _setting("auto", "Format of the rows.")
    limit: int | None = _setting(None, "Use the first N rows only.", gt=0)
    duplicates: Literal["error", "first"] = _setting("error", "Rows whose prompt and response repeat.")


class DataSection(SourceSection):
    max_length: int = _setting(512, "Longest prompt + response in tokens.", not_for="classify", gt=0)
    too_long: Literal["error", "drop", "truncate"] = _setting(
        "error", "What to do with longer training rows.", not_for="classify"
    )


class PromptSection(Section):
    system: str | None = _setting(None, "System message; none leaves it to the chat template.")
    template: Literal["chat", "plain"] = _setting("chat", "The tokenizer's chat template, or `Question: … Answer:`.")
    answer_format: Literal["hash", "xml"] = _setting("hash", "`#### answer`, or <reasoning>…</reasoning><answer>…</answer>.")


class LoraSection(Section):
    r: int = _setting(8, "Rank.", gt=0)
    alpha: float = _setting(64, "lora_alpha; the update is scaled by alpha / r.", gt=0)
    target_modules: list[str] = _setting(
        ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj"], "Modules.", min_length=1
    )
    init: Literal["normal", "pissa", "olora", "default"] = _setting("normal", "normal: A and B ~ N(0, std²), as in the paper.")
    std: float = _setting(0.01, "Standard deviation of init normal.", gt=0)
    compensate: Literal["auto"] | bool = _setting("auto", "Subtract the initial B₀A₀; auto: for pissa and olora.")
    rslora: bool = _setting(False, "Scale by alpha / √r instead.")

    @property
    def compensated(self) -> bool:
        return self.init in ("pissa", "olora") if self.compensate == "auto" else self.compensate


class ThinkingSection(Section):
    max_tokens: int = _setting(4096, "Longest thought in tokens.", gt=0)


class Voter(Section):
    name: str | None = _setting(None, "Its name in the labels; none: model/persona.")
    model: str | None = _setting(None, "Voting model; none is model.name.", identity=False)
    engine: Literal["auto", "vllm", "openai", "transformers"] = _setting(
        "auto", "auto: openai with base_url, else vllm where it is installed, else transformers."
    )
    base_url: str | list[str] | None = _setting(
        None, "Running OpenAI-compatible server (…/v1), or several of one model: requests go to each in turn.", identity=False
    )
    api_key_env: str = _setting("OPENAI_API_KEY", "Environment variable with the key for base_url.", identity=False)
    persona: Persona = _setting("role_play", "Prompt and label words of this voter.")
    words: tuple[str, str] | None = _setting(None, "Label words for System 1 and 2; none: the persona's.")
    shots: int = _setting(16, "Worked examples of a few-shot persona, half of each system.", ge=2)
    shots_path: str | None = _setting(
        None, "Where they come from, rows with question, answer, system; none: lorapar's own.", identity=False
    )
    thinking: ThinkingSection | None = _setting(None, "Let it think before it chooses, in a chat.")
    temperature: float = _setting(0.0, "Sampling temperature of a voter that thinks, or whose words have to be read.", ge=0)
    samples: int = _setting(1, "Times each question is put to it; its vote is the mean.", gt=0)
    weight: float = _setting(1.0, "Weight under rule: weighted.", gt=0)
    calibration: Literal["auto", "none", "held_out", "content_free"] = _setting(
        "auto",
        "Threshold: 0.5, the median over labelled examples, or the answer to empty questions; auto: held_out for few-shot "
        "personas, else none.",
    )
    devices: str | None = _setting(
        None, "Devices of its server, as in CUDA_VISIBLE_DEVICES; voters with devices run side by side.", identity=False
    )
    vllm: dict[str, Any] = _setting(
        {}, "Arguments of its vLLM server, over server.vllm, e.g. {quantization: fp8}.", identity=False
    )

    @property
    def urls(self) -> tuple[str, ...]:
        return (self.base_url,) if isinstance(self.base_url, str) else tuple(self.base_url or ())

    @model_validator(mode="after")
    def _fits(self) -> "Voter":
        if self.engine == "openai" and not self.base_url:
            raise ValueError("engine openai needs base_url")
        if self.base_url and self.engine not in ("openai", "auto"):
            raise ValueError(f"base_url is for engine openai, not {self.engine}")
        if self.base_url and not self.model:
            raise ValueError("base_url needs model, the name it is served under")
        if self.samples > 1 and self.temperature == 0:
            raise ValueError(f"{self.samples} samples of a greedy voter are all the same; set temperature")
        return self


class ServerSection(Section):
    concurrency: int = _setting(64, "Requests in flight.", identity=False, gt=0)
    timeout_s: float = _setting(120, "Longest time for one request; voters that think need more.", identity=False, gt=0)
    stall_s: float = _setting(300, "A server that gives no answer for so long is given up.", identity=False, gt=0)
    batch_size: int = _setting(64, "Questions per batch of engine transformers.", identity=False, gt=0)
    max_model_len: int = _setting(4096, "Context of a vLLM server that lorapar starts.", identity=False, gt=0)
    startup_s: float = _setting(600, "Seconds such a server may take to start.", identity=False, gt=0)
    vllm: dict[str, Any] = _setting({}, "Its further arguments, e.g. {tensor_parallel_size: 2}.", identity=False)
    port: int | None = _setting(None, "Its port; none takes a free one.", identity=False)
    adapter: Literal["auto", "merged", "module"] = _setting(
        "auto", "How it serves an adapter: merged into the weights, or as a LoRA module; auto: merged on CPU.", identity=False
    )


class ClassifySection(Section):
    strategy: Literal["vote", "random"] = _setting("vote", "random: labels drawn at random, the paper's control.")
    voters: list[Voter] = _setting([Voter()], "Who votes.", min_length=1)
    rule: Literal["majority", "weighted", "mean_probability", "unanimous"] = _setting(
        "majority", "How votes become a label; ties go by the mean probability."
    )
    quorum: float = _setting(0.5, "Below this share of voters with a valid vote an example is undecided.", ge=0, le=1)
    min_agreement: float = _setting(0, "Below this share of equal votes an example is undecided.", ge=0, le=1)
    show_answer: bool = _setting(True, "Show the voter the reference answer too.")
    system2_share: float | None = _setting(
        None, "Known share of System 2: each voter's threshold becomes that quantile, in place of calibration.", gt=0, lt=1
    )
    held_out: str | None = _setting(
        None, "Labelled examples for calibration, rows with question, answer, system; none: lorapar's own.", identity=False
    )
    known: str = _setting(
        "system", "Field of the rows with a label from elsewhere (1 or 2); only compared with, where rows have it."
    )
    max_failed: float = _setting(
        0.01, "Give up on a voter when more than this share of its questions cannot be answered.", identity=False, ge=0, le=1
    )
    max_invalid: float = _setting(0.1, "The same for answers that are none of its words.", identity=False, ge=0, le=1)
    seed: int = _setting(0, "Seed of strategy random, and of samples.")


class ScoreSection(Section):
    scorer: Scorer = _setting("taylor2", "Importance formula.")
    examples: int = _setting(100, "Examples per system.", gt=0)
    batch_size: int = _setting(8, "Examples per forward pass.", identity=False, gt=0)
    prompt: PromptSection | None = _setting(None, "Overrides `prompt`.")


class PartitionSection(Section):
    strategy: Strategy = _setting("importance", "How the elements are split.")
    theta: float = _setting(0.9, "Share of the total importance that each system's set reaches.", gt=0, le=1)
    alpha: float = _setting(1, "Share of the shared elements that SFT trains.", ge=0, le=1)
    beta: float = _setting(1, "Share of the shared elements that RL trains.", ge=0, le=1)


class TrainSection(Section):
    lr: float = _setting(2e-4, "Peak learning rate.", gt=0)
    scheduler: Literal["cosine", "linear", "constant"] = _setting("cosine", "Learning rate schedule.")
    warmup: float = _setting(0.03, "Share of the steps that warm up.", ge=0, lt=1)
    weight_decay: float = _setting(0.0, "AdamW weight decay.", ge=0)
    adam_beta1: float = _setting(0.9, "AdamW β₁.", ge=0, lt=1)
    adam_beta2: float = _setting(0.999, "AdamW β₂.", ge=0, lt=1)
    max_grad_norm: float = _setting(1.0, "Gradient clipping.", gt=0)
    epochs: float = _setting(1, "Passes over the data.", gt=0)
    max_steps: int | None = _setting(None, "Stop after N optimizer steps.", gt=0)
    gradient_checkpointing: bool = _setting(False, "Trade time for memory.", identity=False)
    prompt: PromptSection | None = _setting(None, "Overrides `prompt`.")


class SftSection(TrainSection):
    data: Literal["system1", "all"] = _setting("system1", "Rows to train on.")
    system2_share: float = _setting(0.0, "Cold start for RL: System 2 rows added, as a share of the System 1 rows.", ge=0, le=1)
    batch_size: int = _setting(32, "Rows per optimizer step.", gt=0)
    micro_batch: int = _setting(8, "Rows per forward pass; divides batch_size.", gt=0)
    dropout: float = _setting(0.05, "LoRA dropout.", ge=0, lt=1)

    @model_validator(mode="after")
    def _divides(self) -> "SftSection":
        if self.batch_size % self.micro_batch:
            raise ValueError(f"micro_batch {self.micro_batch} does not divide batch_size {self.batch_size}")
        return self


class RlSection(TrainSection):
    data: Literal["system2", "all"] = _setting("system2", "Rows to train on.")
    prompts_per_step: int = _setting(32, "Prompts per optimizer step.", gt=0)
    group: int = _setting(8, "Completions per prompt.", gt=1)
    micro_batch: int = _setting(8, "Completions per forward pass; divides prompts_per_step × group.", gt=0)
    iterations: int = _setting(1, "Optimizer passes over each batch of completions (μ).", gt=0)
    temperature: float = _setting(1.0, "Sampling temperature.", gt=0)
    top_p: float = _setting(1.0, "Nucleus sampling.", gt=0, le=1)
    max_prompt: int = _setting(128, "Longest prompt in tokens; longer ones are dropped and counted.", gt=0)
    max_completion: int = _setting(256, "Longest completion in tokens.", gt=0)
    kl_beta: float = _setting(0.0, "Weight of the KL term.", ge=0)
    kl_reference: Literal["base", "sft"] = _setting("base", "Model the KL term holds on to.")
    loss: Literal["grpo", "bnpo", "dr_grpo", "dapo"] = _setting("dapo", "How token losses are averaged.")
    scale_rewards: Literal["group", "batch", "none"] = _setting("group", "Divide advantages by a standard deviation.")
    rewards: dict[Reward, float] = _setting({"correctness": 2.0}, "Reward functions and their weights.", min_length=1)
    dropout: float = _setting(0.0, "LoRA dropout.", ge=0, lt=1)

    @model_validator(mode="after")
    def _divides(self) -> "RlSection":
        if (self.prompts_per_step * self.group) % self.micro_batch:
            raise ValueError(f"micro_batch {self.micro_batch} does not divide {self.prompts_per_step} × {self.group}")
        return self


class BenchmarkSection(SourceSection):
    kind: Benchmark = _setting("", "A benchmark (lorapar list benchmarks); the entry's name if left out.")
    label: bool = _setting(True, "Let the voters label the rows too, so that results are split by system.", not_for="classify")
    shots: int = _setting(0, "Worked examples in the prompt.", not_for="classify", ge=0)
    shots_path: str | None = _setting(None, "Where they come from; none: the same hub data set.", identity=False)
    shots_split: str = _setting("train", "Their split of a hub data set.", not_for="classify")
    mode: Literal["generate", "likelihood"] = _setting(
        "generate", "likelihood: take the likeliest of the choices (mmlu).", not_for="classify"
    )
    max_new_tokens: int = _setting(256, "Longest answer in tokens.", not_for="classify", gt=0)
    temperature: float = _setting(0.0, "Sampling temperature; 0 is greedy.", not_for="classify", ge=0)
    top_p: float = _setting(1.0, "Nucleus sampling.", not_for="classify", gt=0, le=1)
    samples: int = _setting(1, "Answers per item; pass@k is estimated from them.", not_for="classify", gt=0)
    seed: int = _setting(0, "Seed of sampled answers.", not_for="classify", ge=0)
    prompt: PromptSection | None = _setting(None, "Overrides `prompt`.", not_for="classify")
    tasks: list[str] = _setting([], "Tasks of the evaluation harness (lm_eval).", not_for="classify")

    @model_validator(mode="after")
    def _fits(self) -> "BenchmarkSection":
        if self.samples > 1 and self.temperature == 0:
            raise ValueError(f"samples {self.samples} of a greedy answer are all the same; set temperature")
        return self


class SandboxSection(Section):
    backend: Literal["auto", "bubblewrap", "landlock", "refuse", "unsafe-no-sandbox"] = _setting(
        "auto", "What holds programs that a model wrote; auto: the first of bubblewrap, landlock that passes its self-test."
    )
    seconds: float = _setting(5, "Wall time of one program with all its tests.", gt=0)
    memory_mb: int = _setting(512, "Address space of one program.", ge=64)


class EvalSection(Section):
    targets: list[Literal["base", "init", "sft", "rl"]] = _setting(
        ["base", "sft", "rl"], "Which models to evaluate.", identity=False, min_length=1
    )
    benchmarks: dict[str, BenchmarkSection] = _setting({}, "What they are asked, by a name of your choice.", identity=False)
    engine: Literal["auto", "vllm", "transformers"] = _setting(
        "auto", "auto: vllm on a GPU where it is installed, else transformers; on CPU vllm pays for large benchmarks."
    )
    parity_items: int = _setting(
        8, "First items whose answers are checked against the unmerged adapter; 0: none.", identity=False, ge=0
    )
    sandbox: SandboxSection = _setting(SandboxSection(), "For benchmarks that run code.")

    @field_validator("benchmarks", mode="before")
    @classmethod
    def _defaults(cls, entries: Any) -> Any:
        """Fill in what each kind of benchmark brings along; an own `path` is not read with another data set's settings."""
        from stages.benchmarks import benchmarks

        if not isinstance(entries, dict):
            return entries
        filled = {}
        for name, entry in entries.items():
            if not re.fullmatch(r"\w[\w-]*", str(name)) or name == "train":
                raise ValueError(f"{name!r} cannot be the name of a benchmark")
            if isinstance(entry, dict):
                kind = entry.get("kind") or name
                brought = benchmarks.pick(kind).DEFAULTS if kind in benchmarks.names() else {}
                if "path" in entry:
                    brought = {key: value for key, value in brought.items() if key not in SourceSection.model_fields}
                entry = {**brought, **entry, "kind": kind}
            filled[name] = entry
        return filled


class Config(Section):
    run: str = _setting("default", "Name of the run: a folder below runs_dir.", identity=False, pattern=r"^[\w][\w.-]*$")
    runs_dir: str = _setting("runs", "Where runs are kept.", identity=False)
    seed: int = _setting(41, "Seed of the initial adapter, sampling of rows, masks and training.", ge=0)
    model: ModelSection = _setting(..., "The base model.")
    data: DataSection = _setting(DataSection(), "Training rows.")
    prompt: PromptSection = _setting(PromptSection(), "What the model is shown, in score, sft, rl and eval alike.")
    lora: LoraSection = _setting(LoraSection(), "The adapter.")
    server: ServerSection = _setting(ServerSection(), "Servers that voters and evaluation ask.")
    classify: ClassifySection = _setting(ClassifySection(), "Label examples System 1 or 2.")
    score: ScoreSection = _setting(ScoreSection(), "Importance of every LoRA element.")
    partition: PartitionSection = _setting(PartitionSection(), "Split the elements.")
    sft: SftSection = _setting(SftSection(), "Supervised training of the System 1 part.")
    rl: RlSection = _setting(RlSection(), "GRPO on the System 2 part.")
    eval: EvalSection = _setting(EvalSection(), "What base, init, sft or rl can do.")

    @model_validator(mode="after")
    def _importance(self) -> "Config":
        if self.lora.init == "default" and self.partition.strategy != "all" and self.score.scorer != "magnitude":
            raise ValueError("lora.init default has B = 0, so every importance is zero; choose normal, pissa or olora")
        return self

    @property
    def root(self) -> Path:
        return Path(self.runs_dir) / self.run
