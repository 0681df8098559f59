"""Benchmarks and the sandbox."""

import re
from typing import Annotated, Any, Literal, get_args

from pydantic import ValidationInfo, field_validator, model_validator

from stages.config.fields import MOST_SAMPLES, Section, named, registries_from, setting, without_false
from stages.config.sources import Engine, PromptSection, SourceSection

UNTRAINED = ("base", "init")
Region = Literal["s1_only", "s2_only", "shared"]
REGIONS = get_args(Region)
"""Targets that are one region of the trained adapter."""
Benchmark = Annotated[str, named("benchmarks")]


class BenchmarkSection(SourceSection):
    kind: Benchmark = setting("", "A benchmark (lorapar list benchmarks); the entry's name if left out.")
    label: bool | Literal["known"] = setting(
        True,
        "Label the rows too, so that results are split by system: true: as the training rows are; known: by "
        "the field that classify.known names.",
        ignored_by="classify",
    )
    shots: int = setting(
        0,
        "Worked examples in the prompt; 0 with lm_eval: as many as the task has.",
        ignored_by="classify",
        ge=0,
    )
    shots_path: str | None = setting(
        None, "File with the worked examples; none: the same hub data set.", in_cache_key=False
    )
    shots_split: str = setting(
        "train", "Split with the worked examples, in a hub data set.", ignored_by="classify"
    )
    mode: Literal["generate", "likelihood"] = setting(
        "generate", "likelihood (mmlu only): the answer is the likeliest choice.", ignored_by="classify"
    )
    max_new_tokens: int = setting(256, "Longest answer in tokens.", ignored_by="classify", gt=0)
    temperature: float = setting(0.0, "Sampling temperature; 0 is greedy.", ignored_by="classify", ge=0)
    top_p: float = setting(1.0, "Nucleus sampling.", ignored_by="classify", gt=0, le=1)
    samples: int = setting(
        1, "Answers per item; pass@k is estimated from them.", ignored_by="classify", gt=0, le=MOST_SAMPLES
    )
    seed: int = setting(0, "Seed of sampled answers.", ignored_by="classify", ge=0)
    prompt: PromptSection | None = setting(
        None, "Overrides `prompt`, of which tasks of lm_eval read nothing.", ignored_by="classify"
    )
    tasks: list[str] = setting([], "Tasks of the evaluation harness (lm_eval).", ignored_by="classify")

    @model_validator(mode="after")
    def _fits(self) -> "BenchmarkSection":
        if self.samples > 1 and self.temperature == 0:
            raise ValueError(f"samples {self.samples} of a greedy answer are all the same; set temperature")
        if self.mode == "likelihood" and self.kind not in ("", "mmlu"):
            raise ValueError(f"mode likelihood is for mmlu alone, got kind {self.kind}")
        if self.kind == "humaneval" and self.shots:
            raise ValueError("humaneval has no worked examples; leave out shots")
        if self.tasks and self.kind not in ("", "lm_eval"):
            raise ValueError(f"tasks are those of kind lm_eval, got kind {self.kind}")
        fields = type(self).model_fields
        vain = [name for name in _OF_THE_HARNESS if getattr(self, name) != fields[name].default]
        if self.kind == "lm_eval" and vain:
            raise ValueError(f"{', '.join(vain)}: the harness's tasks have their own; leave it out")
        if self.kind == "lm_eval" and self.prompt:
            mine = self.prompt.model_dump(exclude={"template", "system"})
            if mine != PromptSection().model_dump(exclude={"template", "system"}):
                raise ValueError("prompt: the harness takes a template and a system message, and no more")
        return self


_OF_THE_HARNESS = (
    "max_new_tokens", "samples", "seed", "temperature", "top_p", "split", "shots_path", "shots_split",
)  # fmt: skip


class SandboxSection(Section):
    backend: Literal["auto", "bubblewrap", "landlock", "refuse", "unsafe-no-sandbox"] = setting(
        "auto",
        "Sandbox for programs that a model wrote; auto: bubblewrap, or landlock if that fails its self-test.",
    )
    seconds: float = setting(5, "Wall time of one program with all its tests.", gt=0, le=86400)
    memory_mb: int = setting(512, "Address space of one program, in MiB.", ge=64)


class EvalSection(Section):
    targets: list[Literal["base", "init", "sft", "rl", Region]] = setting(
        ["base", "sft", "rl"],
        "Which models to evaluate. s1_only, s2_only, shared: RL's adapter with the elements of that region "
        "alone, the others as they were initially.",
        in_cache_key=False,
        min_length=1,
    )
    benchmarks: dict[str, BenchmarkSection] = setting(
        {}, "Benchmarks, each under a name of your choice.", in_cache_key=False
    )
    engine: Engine = setting(
        "auto",
        "auto: vllm if installed and on a GPU, else transformers. On CPU vllm pays off for large benchmarks.",
    )
    untrained_items: int | None = setting(
        None,
        "How many items base and init answer, whose answers often run to the longest that is allowed; none: "
        "all. Tasks of lm_eval have a limit of their own.",
        in_cache_key=False,
        gt=0,
    )
    parity_items: int = setting(
        8,
        "How many of the first answers are checked against the unmerged adapter; 0: none.",
        in_cache_key=False,
        ge=0,
    )
    sandbox: SandboxSection = setting(SandboxSection(), "For benchmarks that run code.", in_cache_key=False)

    @field_validator("engine")
    @classmethod
    def _local(cls, engine: str) -> str:
        if engine == "openai":
            raise ValueError("a remote server gives no tokens to grade; use vllm or transformers")
        return engine

    @field_validator("benchmarks", mode="before")
    @classmethod
    def _defaults(cls, entries: Any, info: ValidationInfo) -> Any:
        """Fill in the DEFAULTS of each kind of benchmark.

        An entry with its own `path` gets no defaults for reading rows, which belong to another data set.
        """
        benchmarks = registries_from(info).get("benchmarks")
        if not isinstance(entries, dict):
            return entries
        filled = {}
        for name, entry in without_false(entries).items():
            if not re.fullmatch(r"\w[\w-]*", str(name)) or name == "train":
                raise ValueError(f"{name!r} cannot be the name of a benchmark")
            if isinstance(entry, dict):
                kind = entry.get("kind") or name
                module = benchmarks.pick(kind) if benchmarks and kind in benchmarks.names() else None
                if module and entry.get("label") and not hasattr(module, "load"):
                    raise ValueError(f"{name}: {kind} has no rows to label; leave out label")
                brought = module.DEFAULTS if module else {}
                if "path" in entry:
                    source = SourceSection.model_fields
                    brought = {key: value for key, value in brought.items() if key not in source}
                entry = {**brought, **entry, "kind": kind}
            filled[name] = entry
        return filled

    @field_validator("benchmarks")
    @classmethod
    def _have_rows(cls, entries: dict[str, BenchmarkSection], info: ValidationInfo) -> Any:
        for name, entry in entries.items():
            harness = entry.kind == "lm_eval"
            if registries_from(info).get("benchmarks") and not (entry.tasks if harness else entry.path):
                raise ValueError(f"{name} needs {'tasks' if harness else 'a path, a file or a hub id'}")
        return entries
