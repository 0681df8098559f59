"""The stage table: what each stage is called, reads and needs, and the order that follows from it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from stages.config import Config
from stages.lora.regions import strategies


@dataclass(frozen=True)
class Stage:
    """One row of the table. The callables get the config and the variant."""

    name: str
    help: str
    needs: Callable[[Config, str], tuple[str, ...]]
    """Steps whose artifacts it reads."""
    sections: Callable[[str], tuple[str, ...]]
    """Config sections it reads, as dotted paths; a change in one makes the artifact stale."""
    variants: Callable[[Config], tuple[str, ...]] = lambda config: ("",)
    version: int = 1
    """Raised when the meaning of the output changes; a refactor does not raise it."""


def _trains(other: str) -> Callable[[Config, str], tuple[str, ...]]:
    """What a training stage needs, of which `other` is the other one."""

    def needs(config: Config, _: str) -> tuple[str, ...]:
        start = (config.sft if other == "rl" else config.rl).start_from
        if config.baseline is None:
            return ("classify:train", "partition", "score" if start == "init" else other)
        return ("classify:train",) if start == "init" else ("classify:train", other)

    return needs


def needs_scores(config: Config) -> bool:
    return not strategies.has(config.partition.strategy, "unscored")


def _score_needs(config: Config, _: str) -> tuple[str, ...]:
    return ("classify:train",) if needs_scores(config) else ()


def order(config: Config) -> list[Stage]:
    """The rows of the table in an order in which each stage follows its inputs."""
    names = [name for name in STAGES if config.baseline is None or name not in ("score", "partition")]
    if config.sft.start_from == "rl":
        names.remove("rl")
        names.insert(names.index("sft"), "rl")
    return [STAGES[name] for name in names]


def _eval_needs(config: Config, variant: str) -> tuple[str, ...]:
    target, _, name = variant.partition("@")
    labels = (f"classify:{name}",) if config.eval.benchmarks[name].label else ()
    return (*labels, *{"base": (), "init": ("score",), "sft": ("sft",), "rl": ("rl",)}[target])


def _classify_variants(config: Config) -> tuple[str, ...]:
    return (
        *(["train"] if config.data.path else []),
        *(name for name, benchmark in config.eval.benchmarks.items() if benchmark.label),
    )


def section(config: Config, path: str) -> tuple[str, Any]:
    """The section at a dotted path, and the name under which a stage function takes it."""
    if path.startswith(_BENCHMARKS):
        return "benchmark", config.eval.benchmarks[path.removeprefix(_BENCHMARKS)]
    return path, getattr(config, path)


_BENCHMARKS = "eval.benchmarks."


STAGES = {
    stage.name: stage
    for stage in [
        Stage(
            "classify",
            "Label every example System 1 or 2 by votes.",
            needs=lambda config, split: (),
            sections=lambda rows: ("data" if rows == "train" else f"{_BENCHMARKS}{rows}", "classify", "server"),
            variants=_classify_variants,
            version=2,
        ),
        Stage(
            "score",
            "Make the initial adapter and score every LoRA element for each system.",
            needs=_score_needs,
            sections=lambda _: ("model", "data", "prompt", "lora", "score", "seed"),
        ),
        Stage(
            "partition",
            "Split the elements into S1-only, S2-only and shared, and write the masks.",
            needs=lambda config, _: ("score",),
            sections=lambda _: ("partition", "seed"),
        ),
        Stage(
            "sft",
            "Train the System 1 part on System 1 rows.",
            needs=_trains("rl"),
            sections=lambda _: ("model", "data", "prompt", "lora", "baseline", "sft", "seed"),
        ),
        Stage(
            "rl",
            "Train the System 2 part on System 2 rows with GRPO.",
            needs=_trains("sft"),
            sections=lambda _: ("model", "prompt", "lora", "baseline", "rl", "seed"),
        ),
        Stage(
            "eval",
            "Grade base, init, sft or rl on the benchmarks.",
            needs=_eval_needs,
            sections=lambda variant: ("model", "prompt", "eval", f"{_BENCHMARKS}{variant.partition('@')[2]}", "server"),
            variants=lambda config: tuple(f"{t}@{name}" for t in config.eval.targets for name in config.eval.benchmarks),
        ),
    ]
}
