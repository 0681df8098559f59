"""Steps and their keys, from the stage table and a config.

A step is a stage, or one variant of it: for classify the training rows or those of a benchmark, for partition
the masks of SFT or of RL, for sft its second round, for eval one target at one benchmark.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages.config import Config
from stages.config.fields import cache_key_fields
from stages.data.rows import missing_path_error
from stages.pipeline.stages import Stage, order, section
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
        return f"{self.stage.name}:{self.variant}" if self.variant else self.stage.name

    @property
    def title(self) -> str:
        """Display name within the stage: the variant, or the stage name if there is none."""
        return self.variant or self.stage.name


def plan_steps(config: Config) -> dict[str, Step]:
    """All steps of a config with their keys, in topological order.

    Without `data.path` nothing is trained, and only the base can be evaluated.
    """
    if config.data.path is None and set(config.eval.targets) - {"base"}:
        raise missing_path_error("a file or a hub id; to evaluate only a base model: eval.targets=[base]")
    cache = DigestCache(Path(config.runs_dir) / ".digests.json")
    steps: dict[str, Step] = {}
    waiting = [(stage, variant) for stage in order(config) for variant in stage.variants(config)]

    def first_ready() -> tuple[Stage, str] | None:
        return next(((s, v) for s, v in waiting if set(s.needs(config, v)) <= steps.keys()), None)

    # Steps that wait for a missing input are left out: without training rows only the base is evaluated.
    while ready := first_ready():
        waiting.remove(ready)
        stage, variant = ready
        inputs = {name: steps[name] for name in stage.needs(config, variant)}
        step = _step(config, stage, variant, inputs, cache)
        steps[step.name] = step
    return steps


def _step(config: Config, stage: Stage, variant: str, inputs: dict[str, Step], cache: DigestCache) -> Step:
    readers = (stage.name, f"{stage.name}:{variant}")
    identity = {
        "stage": stage.name,
        "variant": variant,
        "version": stage.version,
        "config": {
            path: cache_key_fields(section(config, path)[1], *readers)
            for path in stage.sections(config, variant)
        },
        "inputs": {name: step.key for name, step in inputs.items()},
        "outside": stage.external_inputs(config, variant, cache),
    }
    return Step(stage, variant, key_of(identity), identity, inputs)


def ancestors(config: Config, steps: dict[str, Step], last: str | None) -> dict[str, Step]:
    """The steps of stage `last` and all their direct and indirect inputs, in order.

    Default for `last`: eval. If nothing is evaluated: every step, but no RL where `eval.targets` names the
    second round of SFT in its place, and no SFT where it names RL alone and RL does not continue SFT.
    """
    if last in (None, "eval"):
        last = "eval" if any(step.stage.name == "eval" for step in steps.values()) else None
    targets = config.eval.targets
    without_sft = "rl" in targets and "sft" not in targets
    skipped = "rl" if config.eval.modes["slow"] != "rl" else "sft" if without_sft else None
    last_steps = [s for s in steps.values() if s.stage.name == last or (last is None and s.name != skipped)]
    names = {step.name for step in _with_inputs(last_steps)}
    return {name: step for name, step in steps.items() if name in names}


def _with_inputs(steps: Iterable[Step]) -> Iterable[Step]:
    for step in steps:
        yield step
        yield from _with_inputs(step.inputs.values())
