"""Benchmarks, one file each, found by file name: `grade(gold, text, answer_format) -> Grade`."""

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
