"""Registries of implementations that a config chooses by name: functions, and modules of a package."""

import ast
import importlib
import importlib.resources
from collections.abc import Callable
from typing import Any

from stages.errors import ConfigError

Function = Callable[..., Any]


class Registry:
    """Functions or modules of one kind by name, with the error for an unknown name.

    A function registers itself (`add`). A module stands there with its import path and is imported when it is
    picked: some, like engines, load torch.
    """

    def __init__(self, kind: str, modules: dict[str, str] | None = None) -> None:
        self.kind = kind
        self._entries: dict[str, Function | str] = {**(modules or {})}
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

    def names(self) -> list[str]:
        return sorted(self._entries)

    def check(self, name: str) -> None:
        """ConfigError with the choices if `name` is unknown."""
        if name not in self._entries:
            raise ConfigError(f"unknown {self.kind} {name!r}", f"choose from: {', '.join(self.names())}")

    def pick(self, name: str) -> Any:
        """Return the function or module called `name`; ConfigError with the choices if there is none."""
        self.check(name)
        entry = self._entries[name]
        return importlib.import_module(entry) if isinstance(entry, str) else entry

    def has_trait(self, name: str, trait: str) -> bool:
        """True if the function called `name` was registered with this trait; a person's own has none."""
        return trait in self._traits.get(name, ())

    def describe(self) -> dict[str, str]:
        """Map each name to the first line of its docstring."""
        return {name: (self._docstring(name) or "").strip().split("\n")[0] for name in self.names()}

    def _docstring(self, name: str) -> str | None:
        entry = self._entries[name]
        if not isinstance(entry, str):
            return entry.__doc__
        package, _, module = entry.rpartition(".")  # read without importing it
        source = importlib.resources.files(package) / f"{module}.py"
        return ast.get_docstring(ast.parse(source.read_text(encoding="utf-8")))
