"""The description of a stage: all that others must know of it without doing its work; stages by name.

At the end are parts that several descriptions share.
"""

import importlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from pydantic import create_model

from stages import ORDER, about
from stages.config import Config, Section
from stages.config.fields import setting
from stages.errors import ConfigError

Check = Callable[[], object]
"""Raises the error that would stop a step."""
TRAIN = "train"
"""Names the training rows where other names are those of benchmarks."""


@dataclass(frozen=True)
class Planned:
    """A step that a config has: all that a stage says of it before it is done."""

    sections: tuple[str, ...]
    """Config sections it reads, as dotted paths; a change in one makes the artifact stale."""
    inputs: tuple[str, ...] = ()
    """Steps whose artifacts it reads."""
    reads: tuple[str, ...] = ()
    """What it reads from outside of the run, by the names of `outside.py`; digests of it are in the key."""
    variant: str = ""
    """Name of the step among those of its stage; empty if there is none other."""
    settings: tuple[str, ...] = ()
    """Dotted paths of settings that are in its key, although their sections leave them out."""
    asked_for: bool = False
    """Whether a run makes it, with its inputs, if nobody says where to end."""
    holds_base: bool = False
    """Whether one process of it holds all weights of the base."""
    memory_hint: str = ""
    """The settings that lower its memory."""
    answers_together: bool = False
    """Whether `run.answer_together` can work ahead for it together with other steps of the stage."""
    own_process: bool = False
    """Whether it loads what cannot be unloaded, and so must not run in the process of a whole run."""


@dataclass(frozen=True)
class Stage:
    """The description of a stage. `stages/NAME/__init__.py` has it as STAGE, and imports nothing heavy.

    The folder's `run.py` does the work.
    """

    name: str
    steps: Callable[[Config], list[Planned]]
    """Its steps under a config; none if this config does without the stage. Asked once in a command."""
    files: Mapping[str, str]
    """The files and folders that it writes → what is in them."""
    variants_help: str = ""
    """Names of the variants, for the help of --only."""
    unkeyed_sections: tuple[str, ...] = ()
    """Sections it reads that are not in its key as a whole; `Planned` names the parts that matter."""
    checks: Callable[[Any, Any], Iterable[Check]] = lambda texts, step: ()
    """What is certain to stop a step, found before the run begins. Gets `Texts` of plan/, and the step."""
    spans: Callable[[Any, str], Iterable[Any]] = lambda texts, variant: ()
    """The lengths of the texts that a variant reads, `Span` of plan/, beside the settings that limit them."""
    work: Callable[[Any, str], Any] | None = None
    """The `Work` of a variant on the `Texts`, both of plan/; None if it cannot be predicted."""
    section: type[Section] | None = None
    """The config section of its name, unless `Config` has it."""
    version: int = 1
    """Raised when the meaning of the output changes, not in a refactoring."""

    @property
    def help(self) -> str:
        return about(self.name)

    def function(self, name: str = "run") -> Callable[..., dict[str, Any]]:
        """A function of `run.py`, which is imported now, and torch with it: `run(context, **sections)`."""
        return getattr(importlib.import_module(f"stages.{self.name}.run"), name)

    def __reduce__(self) -> tuple[Callable[[str], "Stage"], tuple[str]]:
        """Pickled by name, for other processes."""
        return stage, (self.name,)


@cache
def stage(name: str) -> Stage:
    """The stage of this name; ConfigError with the choices if there is none."""
    if name not in ORDER:
        raise ConfigError(f"unknown stage {name!r}", f"choose from: {', '.join(ORDER)}")
    return importlib.import_module(f"stages.{name}").STAGE


def all_stages() -> list[Stage]:
    return [stage(name) for name in ORDER]


@cache
def config_class() -> type[Config]:
    """The config, with a section for each stage that brings one of its own."""
    added: dict[str, Any] = {
        one.name: (one.section, setting(one.section(), one.help)) for one in all_stages() if one.section
    }
    return create_model("Config", __base__=Config, **added) if added else Config


def section(config: Config, path: str) -> tuple[str, Any]:
    """The name under which a stage function takes the section at a dotted path, and the section."""
    return "benchmark" if path.startswith(BENCHMARKS) else path.rpartition(".")[2], setting_at(config, path)


def setting_at(config: Config, path: str) -> Any:
    """The setting or section at a dotted path, such as `classify.voters.0.shots_path`."""
    value: Any = config
    for name in path.split("."):
        if isinstance(value, list):
            value = value[int(name)]
        else:
            value = value[name] if isinstance(value, dict) else getattr(value, name)
    return value


BENCHMARKS = "eval.benchmarks."
"""Begins the path of a benchmark's section."""


ADAPTER = "A plain PEFT adapter in float32; r is doubled where `lora.init` subtracts the initial update."
TRAINED = {
    "adapter/": ADAPTER,
    "history.json": "One object per logged step: TRL's metrics and lorapar's (rewards by system, KL).",
    "curves.png": "history.json as curves.",
}
"""The files of a stage that trains."""


INITIAL = "score"
"""Step that makes the initial adapter."""


def training_inputs(is_baseline: bool, masks: str, start: str | None) -> tuple[str, ...]:
    """The steps that training reads.

    masks: variant of partition. start: step whose adapter is trained on; None: the initial one.
    """
    if not is_baseline:
        return ("classify:train", f"partition:{masks}", start or INITIAL)
    return ("classify:train", start) if start else ("classify:train",)
