"""Steps and their keys, from the descriptions of the stages and a config.

A step is a stage, or one variant of it: for classify the training rows or those of a benchmark, for partition
the masks of SFT or of RL, for sft its second round, for eval one target at one benchmark.
"""

from collections.abc import Collection
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any

from stages.config import Config
from stages.config.fields import cache_key_fields
from stages.data.rows import missing_path_error
from stages.errors import ConfigError
from stages.pipeline.stage import Stage, all_stages, section, stage
from stages.store.digests import DigestCache, key_of


@dataclass(frozen=True)
class Step:
    """A stage (or a variant of it) with the key its artifact has under one config."""

    stage: Stage
    variant: str
    key: str
    identity: dict[str, Any]
    inputs: dict[str, "Step"]

    @property
    def name(self) -> str:
        return step_name(self.stage.name, self.variant)

    @property
    def title(self) -> str:
        """Display name within the stage: the variant, or the stage name if there is none."""
        return self.variant or self.stage.name


def step_name(stage_name: str, variant: str) -> str:
    return f"{stage_name}:{variant}" if variant else stage_name


def plan_steps(config: Config) -> dict[str, Step]:
    """All steps of a config with their keys, each after its inputs, and otherwise in the order of the stages.

    Without `data.path` nothing is trained, and only the base can be evaluated.
    """
    if config.data.path is None and set(config.eval.targets) - {"base"}:
        raise missing_path_error("a file or a hub id; to evaluate only a base model: eval.targets=[base]")
    variants = {
        step_name(s.name, variant): (s, variant) for s in all_stages() for variant in s.variants(config)
    }
    inputs = {name: planned.inputs(config, variant) for name, (planned, variant) in variants.items()}
    # Without training rows, or for a baseline, some steps lack an input; then there are no such steps.
    while lacking := [name for name, needed in inputs.items() if not inputs.keys() >= set(needed)]:
        inputs = {name: needed for name, needed in inputs.items() if name not in lacking}
    cache = digest_cache(config)
    steps: dict[str, Step] = {}
    for name in _in_order(inputs):
        upstream = {source: steps[source] for source in inputs[name]}
        steps[name] = _step(config, *variants[name], upstream, cache)
    return steps


def digest_cache(config: Config) -> DigestCache:
    return DigestCache(Path(config.runs_dir) / ".digests.json")


def _in_order(inputs: dict[str, tuple[str, ...]]) -> list[str]:
    """The names, each after its inputs; of those that could come next, the first one given."""
    sorter = TopologicalSorter(inputs)
    try:
        sorter.prepare()
    except CycleError as error:
        raise ConfigError(f"these steps need each other: {', '.join(error.args[1])}") from None
    positions = {name: position for position, name in enumerate(inputs)}
    ready, ordered = set[str](), list[str]()
    while sorter.is_active():
        ready.update(sorter.get_ready())
        following = min(ready, key=positions.__getitem__)
        ready.remove(following)
        ordered.append(following)
        sorter.done(following)
    return ordered


def _step(config: Config, planned: Stage, variant: str, inputs: dict[str, Step], cache: DigestCache) -> Step:
    readers = (planned.name, f"{planned.name}:{variant}")
    identity = {
        "stage": planned.name,
        "variant": variant,
        "version": planned.version,
        "config": {
            path: cache_key_fields(section(config, path)[1], *readers)
            for path in planned.sections(config, variant)
        },
        "inputs": {name: step.key for name, step in inputs.items()},
        "outside": planned.external_key(config, variant, cache),
    }
    return Step(planned, variant, key_of(identity), identity, inputs)


def check_unchanged(config: Config, step: Step) -> None:
    """Raise ConfigError if what the step reads from outside of the run has changed since it was planned."""
    if step.stage.external_key(config, step.variant, digest_cache(config)) != step.identity["outside"]:
        raise ConfigError(
            f"{step.name} is no longer what was planned: its data or its model have changed since",
            "run the same command again",
        )


def stage_names(steps: dict[str, Step]) -> list[str]:
    """Names of the stages that these are of, in the order in which their first steps come."""
    return list(dict.fromkeys(step.stage.name for step in steps.values()))


def check_stage_name(config: Config, steps: dict[str, Step], name: str) -> None:
    """Raise ConfigError unless the config has a stage of that name."""
    names = stage_names(steps)
    if name in names:
        return
    if config.data.path is None and stage(name):
        raise missing_path_error()
    raise ConfigError(f"unknown stage {name!r}", f"choose from: {', '.join(names)}")


def ancestors(config: Config, steps: dict[str, Step], last: str | None) -> dict[str, Step]:
    """The steps of stage `last` and all their direct and indirect inputs, in order.

    By default `last` is eval or, if nothing is evaluated, each step that trains what `eval.targets` asks for.
    """
    if last in (None, "eval"):
        last = "eval" if "eval" in stage_names(steps) else None
    if last is not None:
        return with_inputs(steps, {name for name, step in steps.items() if step.stage.name == last})
    return with_inputs(steps, steps.keys() - {_not_asked_for(config)})


def _not_asked_for(config: Config) -> str | None:
    """The stage whose adapter no mode of `eval.modes` or target of `eval.targets` uses, if there is one."""
    if config.eval.modes["slow"] != "rl":  # the second round of SFT is in its place
        return "rl"
    return "sft" if "rl" in config.eval.targets and "sft" not in config.eval.targets else None


def with_inputs(steps: dict[str, Step], names: Collection[str]) -> dict[str, Step]:
    """These of the steps, and all their direct and indirect inputs, in order."""
    needed = set(names)
    for name in reversed(steps):  # each step stands after its inputs
        if name in needed:
            needed.update(steps[name].inputs)
    return {name: step for name, step in steps.items() if name in needed}
