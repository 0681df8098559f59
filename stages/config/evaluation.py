"""Settings of the evaluation: benchmarks, targets and the sandbox for code."""

import re
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt, ValidationInfo, field_validator

from stages.config.fields import (
    Samples,
    Section,
    advanced,
    advanced_unkeyed,
    registries_from,
    registry_name,
    setting,
    unkeyed,
    without_false,
)
from stages.config.modes import AUTO, MODES
from stages.config.sources import Engine, PromptSection, SourceSection

UNTRAINED_TARGETS = ("base", "init")
"""Targets without any training."""
TRAINED = ("sft", "rl")
"""Targets with a trained adapter: that of the stage of this name."""
_WEIGHTS = "|".join((*UNTRAINED_TARGETS, *TRAINED))
Target = Annotated[str, Field(pattern=rf"^({_WEIGHTS})(:({'|'.join(MODES)}))?$")]
Benchmark = Annotated[str, registry_name("benchmarks")]


def split_target(target: str) -> tuple[str, str]:
    """The weights that a target has, such as `rl`, and the mode in which it is asked."""
    weights, _, mode = target.partition(":")
    return weights, mode or AUTO


of_answers = partial(setting, ignored_by="classify")
advanced_of_answers = partial(advanced, ignored_by="classify")
"""Settings of the answers, on which the labels of the items do not depend."""


class BenchmarkSection(SourceSection):
    kind: Benchmark = setting("", "One of `lorapar list benchmarks`; if left out, the name of the entry.")
    label: bool | Literal["known"] = of_answers(True)
    """Split results by system. true: labelled as training rows; known: by the field classify.known."""
    shots: NonNegativeInt = of_answers(0, "Worked examples in the prompt.")
    shots_path: str | None = advanced_unkeyed(None)
    """File with the worked examples; none: the data set of the items."""
    shots_split: str = advanced_of_answers("train", "Split with the worked examples, in a hub data set.")
    mode: Literal["generate", "likelihood"] = of_answers("generate")
    """likelihood (mmlu only): the answer is the most likely choice."""
    max_new_tokens: PositiveInt = of_answers(256, "Longest answer in tokens.")
    max_thinking_tokens: PositiveInt | None = advanced_of_answers(None)
    """Longest thought, beside max_new_tokens; none: within it."""
    temperature: NonNegativeFloat = advanced_of_answers(0.0, "Sampling temperature; 0: greedy.")
    samples: Samples = advanced_of_answers(1, "Answers per item; pass@k is estimated from them.")
    prompt: PromptSection | None = advanced_of_answers(None, "In place of the section `prompt`.")

    @property
    def brings_labels(self) -> bool:
        """Whether the items' own labels are used, whatever `classify.strategy` is."""
        return self.label == "known"

    @property
    def takes_shots(self) -> bool:
        """Whether worked examples can stand before a question."""
        return self.kind != "humaneval"

    def conflicts(self, registries: Mapping[str, Any]) -> Iterator[str]:
        if registries and not self.path:
            yield "path is missing: a file or a hub id"
        if self.samples > 1 and self.temperature == 0:
            yield f"samples {self.samples} of a greedy answer are all the same; set temperature"
        if self.mode == "likelihood" and self.kind not in ("", "mmlu"):
            yield f"mode likelihood is for mmlu alone, got kind {self.kind}"
        if self.shots and not self.takes_shots:
            yield "humaneval has no worked examples; leave out shots"


class SandboxSection(Section):
    backend: Literal["auto", "bubblewrap", "landlock", "refuse", "unsafe-no-sandbox"] = setting("auto")
    """auto: bubblewrap, or landlock if that fails; refuse: run no program of a model."""
    seconds: float = setting(5, "Time limit of a program with all its tests.", gt=0, le=86400)


class EvalSection(Section):
    targets: list[Target] = unkeyed(
        ["base", "sft", "rl"],
        "base; init: with the initial adapter; sft, rl: after SFT, after RL. In a mode: rl:fast; else auto.",
        min_length=1,
    )
    benchmarks: dict[str, BenchmarkSection] = unkeyed({}, "Benchmarks, each under a name of your choice.")
    engine: Engine = setting("auto", "auto: vllm if it is installed and there is a GPU, else transformers.")
    untrained_items: PositiveInt | None = advanced_unkeyed(None)
    """Items for targets base and init; none: all."""
    untrained_shots: NonNegativeInt = advanced_unkeyed(0)
    """Worked examples that base and init get beside `shots`, to see the form of an answer."""
    sandbox: SandboxSection = advanced_unkeyed(SandboxSection(), "Sandbox of benchmarks that run code.")

    def conflicts(self, registries: Mapping[str, Any]) -> Iterator[str]:
        if self.engine == "openai":
            yield "engine openai gives no tokens to grade; use vllm or transformers"

    @property
    def weights(self) -> set[str]:
        """Those of the targets, in whatever mode they are asked."""
        return {split_target(target)[0] for target in self.targets}

    @property
    def trained(self) -> list[str]:
        """The trainings whose adapters are evaluated, in order."""
        return [name for name in TRAINED if name in self.weights]

    def as_asked(self, benchmark: BenchmarkSection, target: str) -> BenchmarkSection:
        """The benchmark with the worked examples that a target gets."""
        is_untrained = split_target(target)[0] in UNTRAINED_TARGETS
        shots = self.untrained_shots if is_untrained and benchmark.takes_shots else 0
        return benchmark.model_copy(update={"shots": benchmark.shots + shots}) if shots else benchmark

    @field_validator("benchmarks", mode="before")
    @classmethod
    def _add_defaults(cls, entries: Any, info: ValidationInfo) -> Any:
        """Fill in the DEFAULTS of each entry's kind of benchmark.

        An entry with its own `path` gets no defaults of SourceSection: they describe the default data set.
        """
        benchmarks = registries_from(info).get("benchmarks")
        if not isinstance(entries, dict):
            return entries
        completed = {}
        for name, entry in without_false(entries).items():
            if not re.fullmatch(r"\w[\w-]*", str(name)) or name == "train":
                raise ValueError(f"{name!r} cannot be the name of a benchmark")
            entry = {} if entry is None else entry  # `gsm8k:` alone
            if isinstance(entry, dict):
                kind = entry.get("kind") or name
                module = benchmarks.pick(kind) if benchmarks and kind in benchmarks.names() else None
                defaults = module.DEFAULTS if module else {}
                if "path" in entry:
                    source = SourceSection.model_fields
                    defaults = {key: value for key, value in defaults.items() if key not in source}
                entry = {**defaults, **entry, "kind": kind}
            completed[name] = entry
        return completed
