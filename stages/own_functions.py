"""Functions of a person's own Python file, which a setting names: read without running it, imported once."""

from __future__ import annotations

import ast
import functools
import sys
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any

from stages.errors import ConfigError, MissingInputError


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
