"""Options that several commands share, and helpers that turn them into a config and its steps."""

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from lorapar_cli import terminal
from stages import ORDER, escaping
from stages.config import TRAINED, Config
from stages.data.rows import local_file, missing_path_error
from stages.errors import ConfigError
from stages.pipeline.resolve import load, resolved
from stages.pipeline.stage import all_stages
from stages.pipeline.state import require_current
from stages.pipeline.steps import Step, plan_steps
from stages.runtime import gpu
from stages.store.artifacts import Artifact, Store


def flag(name: str, text: str, **settings: Any) -> Any:
    """Return a typer.Option without a value; typer's help would show `<bool>` as if it took one."""
    return typer.Option(name, metavar="", help=text, **settings)


def value(text: str, metavar: str | None = None, *names: str, **settings: Any) -> Any:
    """Return a typer.Option with a value. text: its help."""
    return typer.Option(*names, metavar=metavar, help=text, **settings)


def argument(text: str, metavar: str | None = None) -> Any:
    return typer.Argument(metavar=metavar, help=text)


def pairs(texts: list[str], option: str, hint: str) -> dict[str, str]:
    """The values of an option in KEY=VALUE texts, by key."""
    parts = [text.partition("=") for text in texts if text.strip()]
    if wrong := [key for key, _, right in parts if not right.strip()]:
        raise ConfigError(f"{option} {wrong[0]}: expected KEY=VALUE", hint)
    return {key.strip(): right.strip() for key, _, right in parts}


_VARIANTS = " ".join(f"{s.name}: {s.variants_help}." for s in all_stages() if s.variants_help)
ConfigPath = Annotated[Path, argument("YAML file; lorapar init writes one.", "CONFIG")]
Overrides = Annotated[list[str] | None, value("Override a setting; repeatable.", "KEY=VALUE", "--set")]
Force = Annotated[bool, flag("--force", "Build again even if current; the old artifact is set aside.")]
Unsafe = Annotated[
    bool,
    flag("--unsafe-no-sandbox", "Run model-written code without a sandbox; this is recorded in the result."),
]
QUIET = "Print only errors, warnings and final results."
Quiet = Annotated[bool, flag("--quiet", QUIET, callback=terminal.set_quiet)]
Json = Annotated[bool, flag("--json", "Print a JSON object.")]
Only = Annotated[list[str] | None, value(f"Only this variant; repeatable. {_VARIANTS}", "NAME", "--only")]
LastStage = Annotated[str | None, value(f"Last stage: {', '.join(ORDER)}.", "STAGE", "--to")]


def with_unsafe(overrides: list[str] | None, unsafe: bool) -> list[str]:
    """The overrides, with those of --unsafe-no-sandbox for the stages that may run code in a sandbox."""
    sandboxed = [n for n, field in Config.model_fields.items() if hasattr(field.default, "sandbox")]
    bare = [f"{stage}.sandbox.backend=unsafe-no-sandbox" for stage in sandboxed if unsafe]
    return [*(overrides or ()), *bare]


def sets(overrides: list[str] | None) -> list[str]:
    """Return the overrides as command-line arguments."""
    return [argument for text in overrides or () for argument in ("--set", text)]


typed_config = ""
"""The config and overrides of this command, as they were typed; empty before they are known."""


def plan_of(path: Path, overrides: list[str] | None) -> tuple[Config, dict[str, Step], Store]:
    """Return the config that was typed, its steps by name, and the store of their artifacts."""
    global typed_config
    typed_config = " ".join(map(escaping.shell, [str(path), *sets(overrides)]))
    config = load(path, overrides)
    if config.data.path is not None:
        local_file(config.data)  # a wrong name is told at once; to ask the hub for a model takes long
    config = resolved(config)
    if config.model.device == "cpu":
        os.environ[gpu.VISIBLE] = ""  # for this process, which has used none yet, and those it starts
    return config, plan_steps(config), Store(config.root)


def trained(config: Config, store: Store, steps: dict[str, Step], stage: str | None = None) -> Artifact:
    """The adapter of a training stage; of the last one that is evaluated, if none is named.

    MissingInputError if it is not current.
    """
    stage = stage or (config.eval.trained or TRAINED)[-1]
    if stage not in TRAINED:
        raise ConfigError(f"--target {stage}: expected one of {', '.join(TRAINED)}")
    if stage not in steps:
        raise missing_path_error()
    return require_current(store, steps[stage])
