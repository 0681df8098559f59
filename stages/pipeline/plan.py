"""Steps and their keys, from the stage table and a config."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages.config import Config
from stages.config.fields import identity
from stages.errors import ConfigError
from stages.pipeline.identity import identities
from stages.pipeline.table import Stage, order, section
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


def plan(config: Config) -> dict[str, Step]:
    """All steps of a config with their keys, in an order in which each follows its inputs.

    Without `data.path` nothing is trained, and only the base can be evaluated.
    """
    if config.data.path is None and set(config.eval.targets) - {"base"}:
        raise ConfigError("data.path is not set", "a file or a hub id; to evaluate only a base model: eval.targets=[base]")
    cache = DigestCache(Path(config.runs_dir) / ".digests.json")
    steps: dict[str, Step] = {}
    for stage in order(config):
        for variant in stage.variants(config):
            needs = stage.needs(config, variant)
            if not set(needs) <= set(steps) or (stage.name == "score" and not config.data.path):
                continue  # without training rows there is only the base to evaluate
            inputs = {name: steps[name] for name in needs}
            sections = {path: identity(section(config, path)[1], stage.name) for path in stage.sections(variant)}
            whole = {
                "stage": stage.name,
                "variant": variant,
                "version": stage.version,
                "config": sections,
                "inputs": {name: step.key for name, step in inputs.items()},
                "outside": identities(config, stage.name, variant, cache),
            }
            step = Step(stage, variant, key_of(whole), whole, inputs)
            steps[step.name] = step
    return steps
