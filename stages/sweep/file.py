"""The file of a table: rows of settings on a base config, seeds, and what a column shows."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import ValidationError, model_validator

from stages.config.fields import Section, WithoutFalse, setting
from stages.config.yaml import tree
from stages.errors import ConfigError, LoraparError, MissingInputError, faults

OWN = ("base", "columns")
"""Keys of a row that are no settings."""
SYSTEMS, FLEXIBLE = ("system1", "system2"), "flexible"
"""What may stand behind TARGET@BENCHMARK beside FIELD=VALUE."""


class Compare(Section):
    against: str = setting(..., "Row that all others are compared with.")
    on: str = setting(..., "Column of accuracies.")

    @model_validator(mode="before")
    @classmethod
    def _on(cls, given: Any) -> Any:
        # YAML 1.1 reads a bare `on` as true.
        return (
            {"on" if key is True else key: v for key, v in given.items()}
            if isinstance(given, dict)
            else given
        )


class Plot(Section):
    """A row called `SERIES: …` is a point of its series; one without a colon is a line across."""

    x: str = setting(..., "Column with the place of a point, such as a share of elements.")
    y: str = setting(..., "Column of accuracies.")


class TableFile(Section):
    title: str = setting(..., "What the table is about.")
    base: str = setting(..., "Config of every cell, as a path relative to the file that names it.")
    set: dict[str, Any] = setting({}, "Settings of every cell, by their dotted names.")
    rows: Annotated[dict[str, dict[str, Any]], WithoutFalse] = setting(
        {}, "Settings of each row, by their dotted names; `base` and `columns` replace the table's own."
    )
    grid: dict[str, list[Any]] = setting({}, "Instead of rows: settings and their values, all with all.")
    seeds: list[int] = setting([41], "Each row is run with each of them.", min_length=1)
    columns: dict[str, str] = setting(
        ...,
        "What each column shows: TARGET@BENCHMARK, of a group with .system1 or .FIELD=VALUE behind it, or "
        "with .flexible by the flexible reading of the answers; one such less another, as in "
        "`rl@demo - sft@demo`; or a value of a step's summary, such as partition:sft.active_share.",
        min_length=1,
    )
    paper: Annotated[dict[str, dict[str, float]], WithoutFalse] = setting(
        {}, "Published values, by row and column."
    )
    compare: Compare | None = setting(None, "A test paired over items, of the same seeds.")
    plot: Plot | None = setting(None, "A figure of one column over another.")
    importance: bool = setting(
        False, "A figure for each row: importance of its elements for System 1 against that for System 2."
    )
    notes: str = setting("", "What a reader has to know.")

    @model_validator(mode="after")
    def _kind(self) -> TableFile:
        if bool(self.rows) == bool(self.grid):
            raise ValueError("a table has rows or a grid")
        if empty := [name for name, values in self.grid.items() if not values]:
            raise ValueError(f"grid: {empty[0]} has no values")
        return self

    def mistakes(self) -> Iterator[str]:
        """What does not go together in it."""
        names = self.settings()
        yield from filter(None, map(_wrong, self.columns.values()))
        for row, own in names.items():
            yield from _wrong_own(row, own)
        for row, values in self.paper.items():
            if row not in names:
                yield f"paper has values for {row!r}, which is no row"
            for column in values.keys() - self.columns.keys():
                yield f"paper has a value of {row!r} for {column!r}, which is no column"
        if self.compare and self.compare.against not in names:
            yield f"compare.against {self.compare.against!r} is no row"
        if self.compare and not _accuracy(self.columns.get(self.compare.on, "")):
            yield f"compare.on {self.compare.on!r} is no column of accuracies"
        if self.plot and self.plot.x not in self.columns:
            yield f"plot.x {self.plot.x!r} is no column"
        if self.plot and not _accuracy(self.columns.get(self.plot.y, "")):
            yield f"plot.y {self.plot.y!r} is no column of accuracies"
        tested = {self.compare and self.compare.on, self.plot and self.plot.y}
        for row, own in names.items():
            for name, text in _columns(own).items():
                if name in tested and isinstance(text, str) and not _accuracy(text):
                    yield f"row {row!r}: its own {name!r} is compared or plotted, and no accuracy"

    def narrowed(self, names: list[str]) -> TableFile:
        """With these columns alone; rows are compared on the first accuracy if their own is not there."""
        columns = {name: text for name, text in self.columns.items() if name in names}
        others = self.columns.keys() - columns.keys()
        rows = {
            row: {**own, "columns": {n: v for n, v in own.get("columns", {}).items() if n not in others}}
            for row, own in self.rows.items()
        }
        on = [name for name, text in columns.items() if _accuracy(text)]
        compare = self.compare
        if compare and compare.on not in columns:
            compare = compare.model_copy(update={"on": on[0]}) if on else None
        plot = self.plot if self.plot and {self.plot.x, self.plot.y} <= columns.keys() else None
        return self.model_copy(update={"columns": columns, "rows": rows, "compare": compare, "plot": plot})

    def settings(self) -> dict[str, dict[str, Any]]:
        """Row → its settings; those of a grid are called by their values."""
        if self.rows:
            return self.rows
        made = {}
        for values in itertools.product(*self.grid.values()):
            one = dict(zip(self.grid, values, strict=True))
            made[", ".join(f"{name.rpartition('.')[2]} {value}" for name, value in one.items())] = one
        return made


@dataclass(frozen=True)
class Column:
    """What one cell shows: an accuracy, a difference of two, or a value of a summary."""

    step: str
    rest: str
    """Behind the step: a group of items, or how answers are read, or the path in the summary."""
    less: Column | None = None
    """What is subtracted, item by item."""

    @classmethod
    def of(cls, text: str) -> Column:
        text, minus, less = text.partition(" - ")
        if minus:
            return replace(cls.of(text), less=cls.of(less))
        if "@" in text:
            step, _, rest = text.partition(".")
            return cls(f"eval:{step}", rest)
        step, _, rest = text.partition(".")
        return cls(step, rest)

    @property
    def graded(self) -> bool:
        return self.step.startswith("eval:")

    @property
    def parts(self) -> list[Column]:
        return [self, *([self.less] if self.less else [])]

    @property
    def steps(self) -> list[str]:
        return [part.step for part in self.parts]


def _accuracy(text: str) -> bool:
    """Whether a column's text is an accuracy, and no difference of two."""
    return "@" in text and " - " not in text


def _wrong(text: str) -> str | None:
    """What is wrong with a column's text: it is an accuracy, a difference of two, or a summary's value."""
    parts = [Column.of(part) for part in text.split(" - ")]
    if len(parts) > 2 or (len(parts) == 2 and not all(part.graded for part in parts)):
        return f"column {text!r}: a difference is one TARGET@BENCHMARK less another"
    for column in parts:
        if not column.graded and not column.rest:
            return f"column {text!r}: expected TARGET@BENCHMARK or STEP.VALUE"
        if column.graded and column.rest not in ("", FLEXIBLE, *SYSTEMS) and "=" not in column.rest:
            return (
                f"column {text!r}: no group {column.rest!r}: system1, system2 or FIELD=VALUE; or {FLEXIBLE}"
            )
    return None


def _wrong_own(row: str, own: dict[str, Any]) -> Iterator[str]:
    """A row's `base` must be a path and its `columns` texts, or null for one that it lacks."""
    if not isinstance(own.get("base", ""), str):
        yield f"row {row!r}: base must be a path, got {own['base']!r}"
    columns = own.get("columns", {})
    if not isinstance(columns, dict) or not all(isinstance(text, str | None) for text in columns.values()):
        yield f"row {row!r}: columns must be names with what they show, or null, got {columns!r}"
    texts = [text for text in _columns(own).values() if isinstance(text, str)]
    yield from filter(None, map(_wrong, texts))


def _columns(own: dict[str, Any]) -> dict[str, Any]:
    """A row's own columns."""
    columns = own.get("columns")
    return columns if isinstance(columns, dict) else {}


def is_table(path: Path) -> bool:
    """Whether a file is a table and not a config: it has columns. A file that cannot be read is one."""
    try:
        return "columns" in tree(path)
    except (OSError, LoraparError):
        return True


def read(path: Path) -> TableFile:
    """A table's file, which may extend another one, as a config may."""
    if not path.is_file():
        raise MissingInputError(f"no table file {path}", "see configs/tables/")
    try:
        found = TableFile.model_validate(tree(path, _beside))
    except ValidationError as error:
        raise refused(path, faults(error)) from None
    if mistakes := list(found.mistakes()):
        raise refused(path, mistakes)
    return found


def _beside(path: Path, own: dict[str, Any]) -> dict[str, Any]:
    """A table's own settings, with its bases as paths that hold where it is extended, too."""
    rows = own.get("rows")
    parts = [own, *(rows.values() if isinstance(rows, dict) else ())]
    for part in parts:
        if isinstance(part, dict) and isinstance(part.get("base"), str):
            part["base"] = str(path.parent / part["base"])
    return own


def refused(path: Path, mistakes: list[str]) -> ConfigError:
    """All mistakes of a table in one error."""
    number = "a mistake" if len(mistakes) == 1 else f"{len(mistakes)} mistakes"
    return ConfigError("\n  ".join([f"{path}: {number}", *mistakes]))
