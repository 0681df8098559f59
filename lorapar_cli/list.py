"""`lorapar list`: lists what can be chosen by name, from the registries that define each choice."""

from typing import Annotated

import typer

from lorapar_cli import terminal
from stages.errors import ConfigError


def command(
    kind: Annotated[
        str | None,
        typer.Argument(
            help="scorers, strategies, rewards, benchmarks, engines, personas or examples; all by default."
        ),
    ] = None,
) -> None:
    choices = kinds()
    if kind is not None and kind not in choices:
        raise ConfigError(f"nothing to list under {kind!r}", f"choose from: {', '.join(choices)}")
    terminal.choices({kind: choices[kind]} if kind else choices)


def kinds() -> dict[str, dict[str, str]]:
    """Map kind → name → one-line description."""
    from stages.init import examples
    from stages.pipeline.resolve import registries
    from stages.rewards.builtin import rewards

    listed = {**registries(), "rewards": rewards, "examples": examples}
    return {kind: choices.describe() for kind, choices in listed.items()}
