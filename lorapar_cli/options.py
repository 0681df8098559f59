"""Options that several commands share, and helpers that turn them into a config and its steps."""

from pathlib import Path
from typing import Annotated, Any

import typer

from lorapar_cli import terminal
from stages import ORDER, escaping
from stages.config import Config
from stages.data.rows import local_file
from stages.pipeline.resolve import load, resolved
from stages.pipeline.stage import all_stages
from stages.pipeline.steps import Step, plan_steps
from stages.runtime import gpu


def flag(*names: str, **settings: Any) -> Any:
    """Return a typer.Option without a value; typer's help would show `<bool>` as if it took one."""
    return typer.Option(*names, metavar="", **settings)


ConfigPath = Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file; lorapar init writes one.")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a setting; repeatable.")
]
Force = Annotated[bool, flag("--force", help="Build again even if current; the old artifact is set aside.")]
Unsafe = Annotated[
    bool,
    flag(
        "--unsafe-no-sandbox",
        help="Run model-written code without a sandbox; this is recorded in the result.",
    ),
]


def _quiet(is_quiet: bool) -> bool:
    terminal.set_quiet(is_quiet)
    return is_quiet


Quiet = Annotated[
    bool, flag("--quiet", callback=_quiet, help="Print only errors, and at the end the results.")
]
Only = Annotated[
    list[str] | None,
    typer.Option(
        "--only",
        metavar="NAME",
        help="Only this variant; repeatable. "
        + " ".join(f"{s.name}: {s.variants_help}." for s in all_stages() if s.variants_help),
    ),
]
Json = Annotated[
    bool,
    flag(
        "--json",
        help="Print JSON: one object per artifact or sample, or one in all for status, plan and results.",
    ),
]

LastStage = Annotated[
    str | None,
    typer.Option("--to", metavar="STAGE", help=f"Last stage: {', '.join(ORDER[:-1])} or {ORDER[-1]}."),
]


SANDBOXED = tuple(n for n, field in Config.model_fields.items() if hasattr(field.default, "sandbox"))
"""The sections of stages that may run code in a sandbox."""


def without_sandbox(unsafe: bool, *stages: str) -> list[str]:
    return [f"{stage}.sandbox.backend=unsafe-no-sandbox" for stage in stages if unsafe]


def sets(overrides: list[str] | None) -> list[str]:
    """Return the overrides as command-line arguments."""
    return [argument for text in overrides or () for argument in ("--set", text)]


typed_config = ""
"""The config and overrides of this command, as they were typed; empty before they are known."""


def plan_of(path: Path, overrides: list[str] | None) -> tuple[Config, dict[str, Step]]:
    global typed_config
    typed_config = typed(path, overrides)
    config = load(path, overrides)
    if config.data.path is not None:
        local_file(config.data)  # a wrong name is told at once; to ask the hub for a model takes long
    config = resolved(config)
    if config.model.device == "cpu":
        gpu.hide()
    return config, plan_steps(config)


def typed(config: Path, overrides: list[str] | None) -> str:
    """Return the config and its overrides as they are typed after a command."""
    return " ".join(map(escaping.shell, [str(config), *sets(overrides)]))
