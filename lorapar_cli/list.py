"""`lorapar list`: what can be chosen by name, from the registries where each choice is defined."""

from typing import Annotated

import typer

from lorapar_cli import terminal
from stages.errors import ConfigError


def command(
    kind: Annotated[str | None, typer.Argument(help="scorers, strategies, rewards, …")] = None,
) -> None:
    """List what can be chosen by name."""
    found = kinds()
    if kind is not None and kind not in found:
        raise ConfigError(f"nothing to list under {kind!r}", f"choose from: {', '.join(found)}")
    terminal.choices({kind: found[kind]} if kind else found)


def kinds() -> dict[str, dict[str, str]]:
    """Kind → name → one line on it."""
    from stages.engines import engines
    from stages.evaluation.benchmarks import benchmarks
    from stages.labelling.personas import personas
    from stages.lora.importance.scorers import scorers
    from stages.lora.importance.strategies import strategies
    from stages.rewards.builtin import rewards

    return {
        "scorers": scorers.describe(),
        "strategies": strategies.describe(),
        "rewards": rewards.describe(),
        "benchmarks": benchmarks.describe(),
        "engines": engines.describe(),
        "personas": personas.describe(),
    }
