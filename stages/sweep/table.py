"""A table of results as a YAML file: rows of settings on a base config, seeds, and what a column shows."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError, model_validator

from stages.config import Config
from stages.config.fields import Section, setting
from stages.errors import ConfigError, LoraparError, MissingInputError
from stages.pipeline.plan import Step, plan
from stages.pipeline.resolve import load, resolved

OWN = ("base", "columns")
"""Keys of a row that are no settings."""


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


class TableFile(Section):
    title: str = setting(..., "What the table is about.")
    base: str = setting(..., "Config of every cell, as a path relative to this file.")
    set: dict[str, Any] = setting({}, "Settings of every cell, by their dotted names.")
    rows: dict[str, dict[str, Any]] = setting(
        {}, "Settings of each row, by their dotted names; `base` and `columns` replace the table's own."
    )
    grid: dict[str, list[Any]] = setting({}, "Instead of rows: settings and their values, all with all.")
    seeds: list[int] = setting([41], "Each row is run with each of them.", min_length=1)
    columns: dict[str, str] = setting(
        ...,
        "What each column shows: TARGET@BENCHMARK, of a group with .system1 or .FIELD=VALUE behind it; one "
        "such less another, as in `rl@demo - sft@demo`; or a value of a step's summary, such as "
        "partition:sft.active_share.",
        min_length=1,
    )
    paper: dict[str, dict[str, float]] = setting({}, "Published values, by row and column.")
    compare: Compare | None = setting(None, "A paired test over items and seeds.")
    notes: str = setting("", "What a reader has to know.")

    @model_validator(mode="after")
    def _names(self) -> TableFile:
        if bool(self.rows) == bool(self.grid):
            raise ValueError("a table has rows or a grid")
        for text in self.columns.values():
            _check(text)
        names = self.settings()
        for row in self.paper:
            if row not in names:
                raise ValueError(f"paper has values for {row!r}, which is no row")
            if unknown := self.paper[row].keys() - self.columns.keys():
                raise ValueError(f"paper has a value for {sorted(unknown)[0]!r}, which is no column")
        if self.compare and self.compare.against not in names:
            raise ValueError(f"compare.against {self.compare.against!r} is no row")
        on = self.columns.get(self.compare.on, "") if self.compare else ""
        if self.compare and ("@" not in on or " - " in on):
            raise ValueError(f"compare.on {self.compare.on!r} is no column of accuracies")
        return self

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
    """Behind the step: a group of items, or the path in the summary."""
    less: Column | None = None
    """What is subtracted, item by item."""

    @classmethod
    def of(cls, text: str) -> Column:
        text, _, less = text.partition(" - ")
        if less:
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
    def steps(self) -> list[str]:
        return [self.step, *(self.less.steps if self.less else [])]


def _check(text: str) -> None:
    """ValueError if a column's text is no accuracy and no value of a summary."""
    column: Column | None = Column.of(text)
    while column is not None:
        if not column.graded and not column.rest:
            raise ValueError(f"column {text!r}: expected TARGET@BENCHMARK or STEP.VALUE")
        if column.graded and column.rest not in ("", "system1", "system2") and "=" not in column.rest:
            raise ValueError(f"column {text!r}: no group {column.rest!r}: system1, system2 or FIELD=VALUE")
        column = column.less


@dataclass(frozen=True)
class Cell:
    """One row with one seed."""

    table: str
    row: str
    seed: int
    base: Path
    overrides: tuple[str, ...]
    config: Config
    steps: dict[str, Step]
    columns: dict[str, Column]
    """Those that this cell has."""


@dataclass(frozen=True)
class Table:
    path: Path
    file: TableFile
    cells: list[Cell]

    @property
    def rows(self) -> list[str]:
        return list(dict.fromkeys(cell.row for cell in self.cells))


def is_table(path: Path) -> bool:
    """Whether a file is a table and not a config: it has columns. A file that cannot be read is one."""
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return True
    return isinstance(tree, dict) and "columns" in tree


def read(path: Path) -> TableFile:
    if not path.is_file():
        raise MissingInputError(f"no table file {path}", "see configs/tables/")
    try:
        return TableFile.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    except ValidationError as error:
        found = [
            f"{'.'.join(map(str, e['loc']))}: {e['msg'].removeprefix('Value error, ')}".removeprefix(": ")
            for e in error.errors()
        ]
        raise _refused(path, found) from None


def _refused(path: Path, mistakes: list[str]) -> ConfigError:
    number = "a mistake" if len(mistakes) == 1 else f"{len(mistakes)} mistakes"
    return ConfigError("\n  ".join([f"{path}: {number}", *mistakes]))


def table(
    path: Path,
    base: Path | None = None,
    only: list[str] | None = None,
    seeds: list[int] | None = None,
    more: list[str] | None = None,
) -> Table:
    """The cells of a table file, planned. One ConfigError lists everything that is wrong with them.

    base: replaces every config that the file names. only: these rows. more: further `key=value` settings.
    """
    file = read(path)
    names = file.settings()
    if unknown := [name for name in only or () if name not in names]:
        raise ConfigError(f"{path}: no row {unknown[0]!r}", f"choose from: {', '.join(names)}")
    wrong: dict[str, list[str]] = {}
    cells = []
    for seed in seeds or file.seeds:
        for name in names:
            if only and name not in only:
                continue
            try:
                cells.append(_cell(path, file, name, seed, base, more or []))
            except LoraparError as error:
                wrong.setdefault(str(error), []).append(repr(name))
    mistakes = [f"row {', '.join(dict.fromkeys(rows))}: {error}" for error, rows in wrong.items()]
    if found := list(dict.fromkeys([*mistakes, *_problems(file, cells, whole=not only)])):
        raise _refused(path, found)
    return Table(path, file, cells)


def _cell(path: Path, file: TableFile, row: str, seed: int, base: Path | None, more: list[str]) -> Cell:
    own = file.settings()[row]
    config_path = base or path.parent / str(own.get("base", file.base))
    if "seed" in own:
        raise ConfigError("seed is set by the table's seeds, not by a row")
    values = {**file.set, **{name: value for name, value in own.items() if name not in OWN}, "seed": seed}
    if wrong := [name for name, value in values.items() if isinstance(value, dict) and "." not in name]:
        raise ConfigError(f"{wrong[0]} is a section: name its settings one by one, as {wrong[0]}.NAME")
    overrides = (*(f"{name}={_yaml(value)}" for name, value in values.items()), *more)
    config = resolved(load(config_path, list(overrides)))
    steps = plan(config)
    texts = {**file.columns, **own.get("columns", {})}
    columns = {name: Column.of(text) for name, text in texts.items() if text is not None}
    if base is not None:
        columns = {name: _elsewhere(column, config) for name, column in columns.items()}
    if unknown := columns.keys() - file.columns.keys():
        raise ConfigError(f"{sorted(unknown)[0]!r} is no column of the table")
    there = {name: column for name, column in columns.items() if steps.keys() >= set(column.steps)}
    if lost := [name for name in own.get("columns", {}) if name in columns and name not in there]:
        raise ConfigError(f"its own column {lost[0]!r} shows {texts[lost[0]]}, which it does not make")
    return Cell(str(path), row, seed, config_path, overrides, config, steps, there)


def _yaml(value: Any) -> str:
    """The value as `--set` reads it."""
    text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10**9)
    return text.removesuffix("...\n").strip()


def _elsewhere(column: Column, config: Config) -> Column:
    """The column on another base: at its only benchmark, unless it has the one that the table names."""
    target, _, name = column.step.partition("@")
    benchmarks = list(config.eval.benchmarks)
    if not column.graded or name in benchmarks or len(benchmarks) != 1:
        return column
    less = _elsewhere(column.less, config) if column.less else None
    return Column(f"{target}@{benchmarks[0]}", column.rest, less)


def _problems(file: TableFile, cells: list[Cell], whole: bool) -> Iterator[str]:
    """Columns that no cell has, if these are the cells of the whole table, and rows that are the same."""
    for name in file.columns if cells and whole else ():
        if not any(name in cell.columns for cell in cells):
            there = [step.removeprefix("eval:") for step in cells[0].steps if step.startswith("eval:")]
            evaluated = ", ".join(there) or "nothing"
            yield f"column {name!r}: no row has {file.columns[name]}; evaluated are {evaluated}"
    seen: dict[str, str] = {}
    for cell in cells:
        shown = tuple(
            (name, cell.config.root, [cell.steps[step].key for step in column.steps], column.rest)
            for name, column in cell.columns.items()
        )
        other = seen.setdefault(f"{cell.seed} {shown}", cell.row)
        if other != cell.row:
            yield f"rows {other!r} and {cell.row!r} are the same"
