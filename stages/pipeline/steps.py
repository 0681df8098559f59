"""Steps and their keys, from what the stages say of a config.

A step is a stage, or one variant of it: for classify the training rows or those of a benchmark, for partition
the masks of SFT or of RL, for eval one target at one benchmark.
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from stages.config import Config
from stages.config.fields import cache_key_fields
from stages.data.rows import missing_path_error
from stages.errors import ConfigError
from stages.pipeline.outside import digests
from stages.pipeline.stage import TRAIN, Planned, Stage, all_stages, section, setting_at, stage
from stages.store.digests import key_of


@dataclass(frozen=True)
class Step:
    """A stage (or a variant of it) with the key its artifact has under one config."""

    stage: Stage
    planned: Planned
    key: str
    identity: dict[str, Any]
    inputs: dict[str, "Step"]

    @property
    def variant(self) -> str:
        return self.planned.variant

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
    if config.data.path is None and config.eval.weights - {"base"}:
        raise missing_path_error("a file or a hub id; to evaluate only a base model: eval.targets=[base]")
    described = {
        step_name(s.name, planned.variant): (s, planned) for s in all_stages() for planned in s.steps(config)
    }
    inputs = {name: planned.inputs for name, (_, planned) in described.items()}
    # Without training rows, or for a baseline, some steps lack an input; then there are no such steps.
    while lacking := [name for name, needed in inputs.items() if not inputs.keys() >= set(needed)]:
        inputs = {name: needed for name, needed in inputs.items() if name not in lacking}
    outside = digests(config, dict.fromkeys(name for step in inputs for name in described[step][1].reads))
    steps: dict[str, Step] = {}
    for name in _in_order(inputs):
        s, planned = described[name]
        readers = (s.name, f"{s.name}:{planned.variant}")
        keyed = {path: cache_key_fields(section(config, path)[1], *readers) for path in planned.sections}
        identity = {
            "stage": s.name,
            "variant": planned.variant,
            "version": s.version,
            "config": keyed | {path: setting_at(config, path) for path in planned.settings},
            "inputs": {source: steps[source].key for source in planned.inputs},
            "outside": {read: outside[read] for read in planned.reads},
        }
        upstream = {source: steps[source] for source in planned.inputs}
        steps[name] = Step(s, planned, key_of(identity), identity, upstream)
    return steps


def _in_order(inputs: dict[str, tuple[str, ...]]) -> list[str]:
    """The names, each after its inputs; of those that could come next, the first one given."""
    left, ordered = dict(inputs), list[str]()
    while left:
        ordered.append(next(name for name, needed in left.items() if not left.keys() & set(needed)))
        del left[ordered[-1]]
    return ordered


def check_unchanged(config: Config, step: Step) -> None:
    """Raise ConfigError if what the step reads from outside of the run has changed since it was planned."""
    if digests(config, step.planned.reads) != step.identity["outside"]:
        raise ConfigError(
            f"{step.name} is no longer what was planned: its data or its model have changed since",
            "run the same command again",
        )


def ancestors(steps: dict[str, Step], last: str | None) -> dict[str, Step]:
    """The steps of stage `last`, by default all that are asked for, with their direct and indirect inputs.

    ConfigError if there is no step of that stage.
    """
    if last is None:
        return with_inputs(steps, [name for name, step in steps.items() if step.planned.asked_for])
    if names := [name for name, step in steps.items() if step.stage.name == last]:
        return with_inputs(steps, names)
    if f"classify:{TRAIN}" not in steps and stage(last):
        raise missing_path_error()
    choices = dict.fromkeys(step.stage.name for step in steps.values())
    raise ConfigError(f"unknown stage {last!r}", f"choose from: {', '.join(choices)}")


def with_inputs(steps: dict[str, Step], names: Collection[str]) -> dict[str, Step]:
    """These of the steps, and all their direct and indirect inputs, in order."""
    needed = set(names)
    for name in reversed(steps):  # each step stands after its inputs
        if name in needed:
            needed.update(steps[name].inputs)
    return {name: step for name, step in steps.items() if name in needed}
