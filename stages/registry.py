"""Registries of implementations that a config chooses by name: functions, and modules of a package."""

import ast
import importlib
import importlib.resources
from collections.abc import Callable
from typing import Any

from stages.errors import ConfigError

Function = Callable[..., Any]


class _Names:
    """Implementations of one kind by name, with the error for an unknown name."""

    def __init__(self, kind: str, entries: dict[str, Any]) -> None:
        self.kind, self._entries = kind, entries

    def names(self) -> list[str]:
        return sorted(self._entries)

    def check(self, name: str) -> None:
        """ConfigError with the choices if `name` is unknown."""
        if name not in self._entries:
            raise ConfigError(f"unknown {self.kind} {name!r}", f"choose from: {', '.join(self.names())}")

    def describe(self) -> dict[str, str]:
        """Map each name to the first line of its docstring."""
        return {name: (self._docstring(name) or "").strip().split("\n")[0] for name in self.names()}

    def _docstring(self, name: str) -> str | None:
        return self._entries[name].__doc__


class Registry(_Names):
    """Functions of one kind, registered under their own names."""

    def __init__(self, kind: str) -> None:
        super().__init__(kind, {})
        self._traits: dict[str, tuple[str, ...]] = {}

    def add(self, *traits: str, name: str = "") -> Callable[[Function], Function]:
        """Decorator that registers a function. traits: properties that callers query with `has_trait`.

        name: what a config calls the function, if that is not its own name.
        """

        def register(function: Function) -> Function:
            self._entries[name or function.__name__] = function
            self._traits[name or function.__name__] = traits
            return function

        return register

    def pick(self, name: str) -> Function:
        """Return the function called `name`; ConfigError with the choices if there is none."""
        self.check(name)
        return self._entries[name]

    def has_trait(self, name: str, trait: str) -> bool:
        """True if the function called `name` was registered with this trait; a person's own has none."""
        return trait in self._traits.get(name, ())


class ModuleRegistry(_Names):
    """Modules of one kind by import path, imported when they are picked: some, like engines, load torch."""

    def pick(self, name: str) -> Any:
        """Import the module called `name`; ConfigError with the choices if there is none."""
        self.check(name)
        return importlib.import_module(self._entries[name])

    def _docstring(self, name: str) -> str | None:
        """Read the docstring without importing the module."""
        package, _, module = self._entries[name].rpartition(".")
        source = importlib.resources.files(package) / f"{module}.py"
        return ast.get_docstring(ast.parse(source.read_text(encoding="utf-8")))
