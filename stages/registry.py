"""Choices of a config by name: functions and modules of lorapar, and functions of a person's own file.

Such a Python file, which a setting names, is read without running it, and imported once.
"""

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

    def __init__(self, kind: str, modules: dict[str, str] | None = None, file_setting: str = "") -> None:
        """file_setting: the setting that names a person's file, if there may be one with more functions."""
        self.kind, self.file_setting = kind, file_setting
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

    def check(self, name: str, file: str | None = None) -> None:
        """ConfigError with the choices if `name` is unknown, in a person's file too; that is not run."""
        known = [*self.names(), *self.in_file(file)]
        if name not in known:
            raise ConfigError(f"unknown {self.kind} {name!r}", f"choose from: {', '.join(known)}")

    def pick(self, name: str, file: str | None = None) -> Any:
        """Return the function or module called `name`; one of a person's file takes precedence.

        ConfigError with the choices if there is none.
        """
        self.check(name, file)
        if file and name in self.in_file(file):
            return getattr(imported(file, self.file_setting), name)
        entry = self._entries[name]
        return importlib.import_module(entry) if isinstance(entry, str) else entry

    def has_trait(self, name: str, trait: str) -> bool:
        """True if the function called `name` was registered with this trait; a person's own has none."""
        return trait in self._traits.get(name, ())

    def describe(self) -> dict[str, str]:
        """Map each name to the first line of its docstring."""
        return {name: (self._docstring(name) or "").strip().split("\n")[0] for name in self.names()}

    def in_file(self, file: str | None) -> dict[str, ast.FunctionDef]:
        """Return the public functions of a person's file by name, without running it; none without a file."""
        if not file:
            return {}
        title = f"{self.file_setting} {file}"
        try:
            tree = ast.parse(Path(file).read_text(encoding="utf-8"))
        except OSError as error:
            raise MissingInputError(f"{title}: {error.strerror}") from None
        except (SyntaxError, ValueError) as error:
            raise ConfigError(f"{title} is not Python: {error}") from None
        functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
        return {function.name: function for function in functions if not function.name.startswith("_")}

    def _docstring(self, name: str) -> str | None:
        entry = self._entries[name]
        if not isinstance(entry, str):
            return entry.__doc__
        package, _, module = entry.rpartition(".")  # read without importing it
        source = importlib.resources.files(package) / f"{module}.py"
        return ast.get_docstring(ast.parse(source.read_text(encoding="utf-8")))


@functools.cache
def imported(file: str, title: str) -> Any:
    """Import a Python file of any name as a module, once. title: the setting that names it."""
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
