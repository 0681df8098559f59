"""What can be chosen by name: functions that register themselves, and the modules of a package."""

import ast
import importlib
import pkgutil
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from stages.errors import ConfigError

Function = Callable[..., Any]


class _Named:
    """Names of one kind, and the one error for every other name."""

    kind: str

    def names(self) -> list[str]:
        raise NotImplementedError

    def check(self, name: str) -> None:
        """ConfigError with the choices if nothing is called `name`."""
        if name not in self.names():
            raise ConfigError(f"unknown {self.kind} {name!r}", f"choose from: {', '.join(self.names())}")


class Registry(_Named):
    """The functions of one kind, found by name; the name is the function's own."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._functions: dict[str, Function] = {}
        self._traits: dict[str, set[str]] = {}

    def add(self, *traits: str) -> Callable[[Function], Function]:
        """Decorator that registers a function with its traits: what others must know without calling it."""

        def register(function: Function) -> Function:
            self._functions[function.__name__] = function
            self._traits[function.__name__] = set(traits)
            return function

        return register

    def names(self) -> list[str]:
        return sorted(self._functions)

    def describe(self) -> dict[str, str]:
        """Each name with the first line of its docstring."""
        return {name: _first_line(self._functions[name].__doc__) for name in self.names()}

    def pick(self, name: str) -> Function:
        """The function called `name`; ConfigError with the choices if there is none."""
        self.check(name)
        return self._functions[name]

    def has(self, name: str, trait: str) -> bool:
        """Whether the function called `name` was registered with this trait."""
        self.check(name)
        return trait in self._traits[name]


class Files(_Named):
    """The modules of a package that define `mark` at top level, found by file name; the rest are helpers."""

    def __init__(self, kind: str, package: str, folder: list[str], mark: str) -> None:
        self.kind = kind
        self._package = package
        marked = re.compile(rf"^(?:async )?(?:def )?{mark}\b\s*[:=(]", re.MULTILINE)
        # Read as text: importing an engine would load torch for every command.
        texts = {
            module.name: (Path(folder[0]) / f"{module.name}.py").read_text(encoding="utf-8")
            for module in pkgutil.iter_modules(folder)
        }
        self._texts = {name: text for name, text in texts.items() if marked.search(text)}

    def names(self) -> list[str]:
        return sorted(self._texts)

    def describe(self) -> dict[str, str]:
        """Each name with the first line of its module's docstring."""
        return {name: _first_line(ast.get_docstring(ast.parse(self._texts[name]))) for name in self.names()}

    def pick(self, name: str) -> Any:
        """The module called `name`; ConfigError with the choices if there is none."""
        self.check(name)
        return importlib.import_module(f"{self._package}.{name}")


def _first_line(doc: str | None) -> str:
    return (doc or "").strip().split("\n")[0]
