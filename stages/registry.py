"""Registries of implementations that a config chooses by name: functions, and modules of a package."""

import ast
import importlib
import importlib.resources
from collections.abc import Callable
from typing import Any

from stages.errors import ConfigError

Function = Callable[..., Any]


class _Named:
    """Set of valid names of one kind, with the error for an unknown name."""

    kind: str

    def names(self) -> list[str]:
        raise NotImplementedError

    def check(self, name: str) -> None:
        """ConfigError with the choices if `name` is unknown."""
        if name not in self.names():
            raise ConfigError(f"unknown {self.kind} {name!r}", f"choose from: {', '.join(self.names())}")


class Registry(_Named):
    """Functions of one kind, registered under their own names or given ones."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._functions: dict[str, Function] = {}
        self._traits: dict[str, set[str]] = {}

    def add(self, *traits: str, name: str = "") -> Callable[[Function], Function]:
        """Decorator that registers a function. traits: properties that callers can query with `has_trait`.

        name: what a config calls the function, if that is not its own name.
        """

        def register(function: Function) -> Function:
            self._functions[name or function.__name__] = function
            self._traits[name or function.__name__] = set(traits)
            return function

        return register

    def names(self) -> list[str]:
        return sorted(self._functions)

    def describe(self) -> dict[str, str]:
        """Map each name to the first line of its docstring."""
        return {name: _first_line(self._functions[name].__doc__) for name in self.names()}

    def pick(self, name: str) -> Function:
        """Return the function called `name`; ConfigError with the choices if there is none."""
        self.check(name)
        return self._functions[name]

    def has_trait(self, name: str, trait: str) -> bool:
        """True if the function called `name` was registered with this trait."""
        self.check(name)
        return trait in self._traits[name]


class Modules(_Named):
    """Modules of one kind by name, imported when they are picked, because some, like engines, load torch."""

    def __init__(self, kind: str, modules: dict[str, str]) -> None:
        """modules: name → import path."""
        self.kind = kind
        self._modules = modules

    def names(self) -> list[str]:
        return sorted(self._modules)

    def describe(self) -> dict[str, str]:
        """Map each name to the first line of its module's docstring, without importing the module."""
        return {name: _first_line(_docstring(self._modules[name])) for name in self.names()}

    def pick(self, name: str) -> Any:
        """Import the module called `name`; ConfigError with the choices if there is none."""
        self.check(name)
        return importlib.import_module(self._modules[name])


def _docstring(module: str) -> str | None:
    source = importlib.resources.files(module.rpartition(".")[0]) / f"{module.rpartition('.')[2]}.py"
    return ast.get_docstring(ast.parse(source.read_text(encoding="utf-8")))


def _first_line(doc: str | None) -> str:
    return (doc or "").strip().split("\n")[0]
