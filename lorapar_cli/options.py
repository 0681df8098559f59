"""Options that several commands take, and what they make of them: a config and its steps."""

import shlex
from pathlib import Path
from typing import Annotated

import typer

from stages.config import Config
from stages.pipeline.resolve import load, resolved
from stages.pipeline.steps import Step, plan_steps

ConfigPath = Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file; see configs/.")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a setting; repeatable.")
]
Force = Annotated[bool, typer.Option("--force", help="Build again, and keep the old artifact aside.")]
Unsafe = Annotated[
    bool,
    typer.Option(
        "--unsafe-no-sandbox",
        help="Run code that a model wrote with nothing around it; recorded in the result.",
    ),
]
Only = Annotated[
    list[str] | None,
    typer.Option(
        "--only",
        metavar="NAME",
        help="Only this variant, repeatable. classify: train or a benchmark; score: score or rl; "
        "partition: sft or rl.",
    ),
]
Json = Annotated[
    bool,
    typer.Option(
        "--json", help="Print JSON: one object for each artifact or sample; status, plan and results are one."
    ),
]


def sets(overrides: list[str] | None) -> list[str]:
    """The overrides as arguments of a command."""
    return [part for text in overrides or () for part in ("--set", text)]


def plan_of(path: Path, overrides: list[str] | None) -> tuple[Config, dict[str, Step]]:
    config = resolved(load(path, overrides))
    return config, plan_steps(config)


def typed(config: Path, overrides: list[str] | None) -> str:
    """A config and its overrides, as they are typed behind a command."""
    return shlex.join([str(config), *sets(overrides)])
