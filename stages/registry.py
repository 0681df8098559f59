"""Choices of a config by name: functions and modules of lorapar, and functions of a person's own file.

Such a Python file, which a setting names, is read without running it, and imported once.
"""

from __future__ import annotations

import ast
import functools
import importlib
import importlib.resources
import sys
from collections.abc import Callable
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any

from stages.errors import ConfigError, MissingInputError

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


def functions_in(file: str, title: str) -> dict[str, ast.FunctionDef]:
    """Return the public top-level functions of a Python file by name, without running it.

    title: the setting that names the file, for errors.
    """
    try:
        tree = ast.parse(Path(file).read_text(encoding="utf-8"))
    except OSError as error:
        raise MissingInputError(f"{title} {file}: {error.strerror}") from None
    except (SyntaxError, ValueError) as error:
        raise ConfigError(f"{title} {file} is not Python: {error}") from None
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    return {function.name: function for function in functions if not function.name.startswith("_")}


def own_function(name: str, file: str | None, title: str) -> Any:
    """The function of that name in a person's file, which is run only if it has one; else None."""
    return getattr(imported(file, title), name) if file and name in functions_in(file, title) else None


@functools.cache
def imported(file: str, title: str) -> Any:
    """Import a Python file of any name as a module, once."""
    loader = SourceFileLoader(f"lorapar_{title.rpartition('.')[2]}", file)
    module = ModuleType(loader.name)
    module.__file__ = file
    sys.modules[loader.name] = module  # dataclasses and pickle look for it there
    try:
        loader.exec_module(module)
    except SystemExit as error:
        raise ConfigError(f"{title} {file} tried to end lorapar, with {error.code!r}") from None
    except Exception as error:
        raise ConfigError(f"{title} {file} does not load: {type(error).__name__}: {error}") from error
    return module
