"""`lorapar list`: lists what can be chosen by name, from the registries that define each choice."""

from typing import Annotated

from lorapar_cli.options import argument
from stages.errors import ConfigError

KINDS = "scorers, strategies, rewards, benchmarks, engines, personas or examples; all by default."


def command(kind: Annotated[str | None, argument(KINDS)] = None) -> None:
    choices = kinds()
    if kind is not None and kind not in choices:
        raise ConfigError(f"nothing to list under {kind!r}", f"choose from: {', '.join(choices)}")
    for name in [kind] if kind else choices:
        print(name)
        width = max(14, *map(len, choices[name]))
        for choice, text in choices[name].items():
            print(f"  {choice:<{width}} {text}")


def kinds() -> dict[str, dict[str, str]]:
    """Map kind → name → one-line description."""
    from stages.init import examples
    from stages.pipeline.resolve import registries
    from stages.rewards.builtin import rewards

    listed = {**registries(), "rewards": rewards, "examples": examples}
    return {kind: choices.describe() for kind, choices in listed.items()}
