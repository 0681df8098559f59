"""Named functions: `@scorers.add` registers one under its own name, `scorers.pick(name)` finds it."""

from collections.abc import Callable
from typing import Any

from stages.errors import ConfigError

Function = Callable[..., Any]


class Registry:
    """The functions of one kind, found by name; the name is the function's own."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._functions: dict[str, Function] = {}

    def add(self, function: Function) -> Function:
        self._functions[function.__name__] = function
        return function

    def names(self) -> list[str]:
        return sorted(self._functions)

    def describe(self) -> dict[str, str]:
        """Each name with the first line of its docstring."""
        return {name: (self._functions[name].__doc__ or "").strip().split("\n")[0] for name in self.names()}

    def pick(self, name: str) -> Function:
        """The function called `name`; ConfigError with the choices if there is none."""
        if name not in self._functions:
            raise ConfigError(f"unknown {self.kind} {name!r}", f"choose from: {', '.join(self.names())}")
        return self._functions[name]
