"""Benchmarks, one file each, found by file name.

`DEFAULTS`: settings of its entry under `eval.benchmarks`. `load(section)`: its items as Examples. `ask(examples, section,
renderer)`: one Asked per item. `grade(example, output, context)`: a Grade. `GROUPS`: fields of the items by which results are
split too. A benchmark that is run by someone else's harness has `run` instead of all but DEFAULTS.
"""

import importlib
import pkgutil
from types import ModuleType

from stages.errors import ConfigError


class _Files:
    """The files of this folder, with a registry's manners."""

    def names(self) -> list[str]:
        return sorted(m.name for m in pkgutil.iter_modules(__path__) if m.name not in ("statistics", "grading"))

    def describe(self) -> dict[str, str]:
        return {name: (self.pick(name).__doc__ or "").strip().split("\n")[0] for name in self.names()}

    def pick(self, name: str) -> ModuleType:
        if name not in self.names():
            raise ConfigError(f"unknown benchmark {name!r}", f"choose from: {', '.join(self.names())}")
        return importlib.import_module(f"stages.benchmarks.{name}")


benchmarks = _Files()
