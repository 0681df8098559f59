"""The stage table: inputs, config sections, cache-key parts, variants and version of each stage."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from stages.config import (
    KEPT,
    REGIONS,
    ROUTED,
    SECOND_SFT,
    TRAINED,
    UNTRAINED_TARGETS,
    Config,
    SourceSection,
)
from stages.config.fields import cache_key_fields
from stages.config.rl import OF_UPDATES
from stages.errors import ConfigError
from stages.evaluation.benchmarks import benchmarks
from stages.lora.examples import PROTECTED
from stages.lora.importance.scorers import scorers
from stages.lora.importance.strategies import strategies
from stages.pipeline import cache_key
from stages.rewards import loading
from stages.store.digests import DigestCache


@dataclass(frozen=True)
class Stage:
    """One row of the table. The callables get the config and the variant."""

    name: str
    needs: Callable[[Config, str], tuple[str, ...]]
    """Steps whose artifacts it reads."""
    sections: Callable[[Config, str], tuple[str, ...]]
    """Config sections it reads, as dotted paths; a change in one makes the artifact stale."""
    external_inputs: Callable[[Config, str, DigestCache], dict[str, Any]]
    """Cache-key parts for what it reads from outside of the run."""
    variants: Callable[[Config], tuple[str, ...]] = lambda config: ("",)
    unkeyed_sections: tuple[str, ...] = ()
    """Sections it reads that are not in its key as a whole; `external_inputs` adds the parts that matter."""
    version: int = 1
    """Raised when the meaning of the output changes, not in a refactoring."""


def order(config: Config) -> list[Stage]:
    """The stages of a config in topological order: each follows its inputs."""
    names = [name for name in STAGES if config.baseline is None or name not in ("score", "partition")]
    if config.sft.start_from == "rl":
        names.remove("rl")
        names.insert(names.index("sft"), "rl")
    return [STAGES[name] for name in names]


def check_stage_name(config: Config, name: str) -> None:
    """Raise ConfigError unless the config has a stage of that name."""
    if name not in (names := [stage.name for stage in order(config)]):
        raise ConfigError(f"unknown stage {name!r}", f"choose from: {', '.join(names)}")


def section(config: Config, path: str) -> tuple[str, Any]:
    """The name under which a stage function takes the section at a dotted path, and the section."""
    if path.startswith(_BENCHMARKS):
        return "benchmark", config.eval.benchmarks[path.removeprefix(_BENCHMARKS)]
    value: Any = config
    for name in path.split("."):
        value = getattr(value, name)
    return path.rpartition(".")[2], value


_BENCHMARKS = "eval.benchmarks."


def _classify_sections(config: Config, rows: str) -> tuple[str, ...]:
    return ("data" if rows == "train" else f"{_BENCHMARKS}{rows}", "classify", "server")


def _classify_outside(config: Config, rows: str, cache: DigestCache) -> dict[str, Any]:
    source = config.data if rows == "train" else config.eval.benchmarks[rows]
    if rows != "train" and config.eval.benchmarks[rows].brings_labels:
        return {"rows": cache_key.of_source(source, cache), "labels": ["known", config.classify.known]}
    return {"rows": cache_key.of_source(source, cache), **cache_key.of_voters(config, cache)}


def _classify_variants(config: Config) -> tuple[str, ...]:
    labelled = (name for name, benchmark in config.eval.benchmarks.items() if benchmark.label)
    return (*(["train"] if config.data.path else []), *labelled)


def _score_needs(config: Config, scored: str) -> tuple[str, ...]:
    if scored == PROTECTED:
        return ("score",)
    if strategies.has_trait(config.partition.strategy, "unscored"):
        return ()
    if scored != "rl":
        return ("classify:train",)
    return ("classify:train", "sft", *(["score"] if rescored_by_rollouts(config) else []))


def rescored_by_rollouts(config: Config) -> bool:
    """Whether RL's elements are scored by gradients of RL."""
    return config.rl.rescore is not None and scorers.has_trait(config.rl.rescore, "rollouts")


def _score_outside(config: Config, scored: str, cache: DigestCache) -> dict[str, Any]:
    key = _model_key(config, scored, cache)
    if scored == PROTECTED:
        return {**key, "protected": cache_key.of_source(SourceSection(path=config.partition.protect), cache)}
    if scored != "rl":
        return key
    if not rescored_by_rollouts(config):
        return {**key, "scorer": config.rl.rescore}
    rl = {name: value for name, value in cache_key_fields(config.rl).items() if name not in OF_UPDATES}
    if loading.any_needs_sandbox(config.rl.rewards, config.rl.rewards_file):
        rl["sandbox"] = cache_key_fields(config.rl.sandbox)
    return {**_rewards_outside(config, scored, cache), "scorer": config.rl.rescore, "rl": rl}


def _score_variants(config: Config) -> tuple[str, ...]:
    """Scores of the initial adapter, also on protected rows, and with `rl.rescore` those of SFT's adapter."""
    if config.data.path is None:
        return ()
    protected = (PROTECTED,) if config.partition.protect else ()
    return ("", *protected, *(("rl",) if config.rl.rescore else ()))


def _protected_step(config: Config) -> tuple[str, ...]:
    """The scores of the protected rows, if there are any.

    They stand before other scores, because the last artifact of a stage has its name in a context's inputs.
    """
    return (f"score:{PROTECTED}",) if config.partition.protect else ()


def _partition_needs(config: Config, trained: str) -> tuple[str, ...]:
    scores = "score:rl" if trained == "rl" and config.rl.rescore else "score"
    return (*_protected_step(config), scores)


def _partition_outside(config: Config, _: str, cache: DigestCache) -> dict[str, Any]:
    section = config.partition
    return {"protect_theta": section.protect_theta} if section.protect else {}


def _model_key(config: Config, _: str, cache: DigestCache) -> dict[str, Any]:
    return {"model": cache_key.of_model(config.model, cache)}


def _training_needs(stage: str, first_stage: str) -> Callable[[Config, str], tuple[str, ...]]:
    """The inputs of a training stage. first_stage: the other one, which it may continue."""

    def needs(config: Config, variant: str) -> tuple[str, ...]:
        masks, start = stage, first_stage
        if variant:  # the second round of SFT trains the elements that RL would
            masks, start = "rl", "sft"
        elif (config.sft if stage == "sft" else config.rl).start_from == "init":
            start = "score"
        elif stage == "rl" and config.sft.rounds == 2:
            start = SECOND_SFT
        if config.baseline is None:
            return ("classify:train", *_protected_step(config), f"partition:{masks}", start)
        return ("classify:train",) if start == "score" else ("classify:train", start)

    return needs


def _sft_variants(config: Config) -> tuple[str, ...]:
    return ("",) if config.sft.rounds == 1 else ("", SECOND_SFT.partition(":")[2])


def _rl_sections(config: Config, _: str) -> tuple[str, ...]:
    runs_code = loading.any_needs_sandbox(config.rl.rewards, config.rl.rewards_file)
    return ("model", "prompt", "lora", "baseline", "rl", "seed", *(["rl.sandbox"] if runs_code else []))


def _rewards_outside(config: Config, variant: str, cache: DigestCache) -> dict[str, Any]:
    return {
        **_model_key(config, variant, cache),
        **cache_key.of_file("rewards_file", config.rl.rewards_file, cache),
    }


def _rl_outside(config: Config, variant: str, cache: DigestCache) -> dict[str, Any]:
    # In the key only where steps are kept, so that other keys stay as they were.
    kept = {"keep_steps": sorted(config.rl.keep_steps)} if config.rl.keep_steps else {}
    return {**_rewards_outside(config, variant, cache), **kept}


def _eval_needs(config: Config, variant: str) -> tuple[str, ...]:
    target, _, name = variant.partition("@")
    if target == ROUTED:
        return ("classify:train", *(f"eval:{mode}@{name}" for mode in config.eval.modes.values()))
    labels = (f"classify:{name}",) if config.eval.benchmarks[name].label else ()
    if target.startswith(KEPT):
        return (*labels, "rl")
    if target in REGIONS:
        return (*labels, "score", "partition:rl", "rl")
    if target in TRAINED:
        return (*labels, TRAINED[target])
    return (*labels, "score") if target == "init" else labels


def _eval_sections(config: Config, variant: str) -> tuple[str, ...]:
    target, _, name = variant.partition("@")
    if target == ROUTED:
        return ("model", "prompt", "eval", f"{_BENCHMARKS}{name}", "server", "classify")
    runs_code = getattr(benchmarks.pick(config.eval.benchmarks[name].kind), "SANDBOX", False)
    code = ("eval.sandbox",) if runs_code else ()
    return ("model", "prompt", "eval", f"{_BENCHMARKS}{name}", "server", *code)


def _eval_outside(config: Config, variant: str, cache: DigestCache) -> dict[str, Any]:
    target, _, name = variant.partition("@")
    benchmark = config.eval.benchmarks[name]
    # The tasks of another harness have no such limit.
    items = config.eval.untrained_items if target in UNTRAINED_TARGETS and not benchmark.tasks else None
    return {
        **({"items": items} if items else {}),
        **_model_key(config, variant, cache),
        "rows": cache_key.of_source(benchmark, cache),
        **cache_key.of_shots(benchmark, cache),
        **(cache_key.of_router(config, cache) if target == ROUTED else {}),
        **cache_key.of_server(config),
    }


def _eval_variants(config: Config) -> tuple[str, ...]:
    return tuple(f"{target}@{name}" for target in config.eval.targets for name in config.eval.benchmarks)


STAGES = {
    stage.name: stage
    for stage in [
        Stage(
            name="classify",
            needs=lambda config, rows: (),
            sections=_classify_sections,
            external_inputs=_classify_outside,
            variants=_classify_variants,
            unkeyed_sections=("model",),
            version=7,
        ),
        Stage(
            name="score",
            needs=_score_needs,
            sections=lambda config, _: ("model", "data", "prompt", "lora", "score", "seed"),
            external_inputs=_score_outside,
            variants=_score_variants,
            unkeyed_sections=("rl", "partition.protect"),
            version=2,
        ),
        Stage(
            name="partition",
            needs=_partition_needs,
            sections=lambda config, trained: ("partition", "seed"),
            external_inputs=_partition_outside,
            variants=lambda config: ("sft", "rl"),
            version=2,
        ),
        Stage(
            name="sft",
            needs=_training_needs("sft", first_stage="rl"),
            sections=lambda config, _: ("model", "data", "prompt", "lora", "baseline", "sft", "seed"),
            external_inputs=_model_key,
            variants=_sft_variants,
            version=7,
        ),
        Stage(
            name="rl",
            needs=_training_needs("rl", first_stage="sft"),
            sections=_rl_sections,
            external_inputs=_rl_outside,
            version=9,
        ),
        Stage(
            name="eval",
            needs=_eval_needs,
            sections=_eval_sections,
            external_inputs=_eval_outside,
            variants=_eval_variants,
            version=10,
        ),
    ]
}
