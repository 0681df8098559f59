"""The cells of a table, planned: each row with each seed."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import yaml

from stages.config import Config
from stages.errors import ConfigError, LoraparError
from stages.pipeline.resolve import load, resolved
from stages.pipeline.steps import Step, plan_steps
from stages.sweep.file import OWN, Column, TableFile, read, refused


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
    same: dict[str, str]
    """Rows that are left out because with another base, or without some columns, they are the same as an
    earlier row, with that row."""
    replaced: list[str]
    """Rows with a config of their own, which another base replaces."""

    @property
    def against(self) -> str | None:
        """The row that the others are compared with, or the one that it is the same as."""
        compare = self.file.compare
        return self.same.get(compare.against, compare.against) if compare else None

    @property
    def rows(self) -> list[str]:
        return list(dict.fromkeys(cell.row for cell in self.cells))


def table(
    path: Path,
    base: Path | None = None,
    only: list[str] | None = None,
    seeds: list[int] | None = None,
    more: list[str] | None = None,
    columns: list[str] | None = None,
) -> Table:
    """The cells of a table file, planned. One ConfigError lists everything that is wrong with them.

    base: replaces every config that the file names. only: these rows, or those that a pattern such as `QKV*`
    fits. more: further `key=value` settings. columns: these alone, chosen as rows are. Rows that another
    base, or fewer columns, make the same are left out.
    """
    file = read(path)
    if columns:
        file = file.narrowed(_chosen(path, "column", columns, list(file.columns)))
    if any(name.partition("=")[0].strip() == "seed" for name in more or ()):
        raise ConfigError("--set seed: a table has seeds of its own", "--seeds 1,2,3")
    names = file.settings()
    wanted = _chosen(path, "row", only, list(names)) if only else list(names)
    wrong: dict[str, list[str]] = {}
    cells = []
    for seed in dict.fromkeys(seeds or file.seeds):
        for name in wanted:
            try:
                cells.append(_cell(path, file, name, seed, base, more or []))
            except LoraparError as error:
                wrong.setdefault(str(error), []).append(repr(name))
    mistakes = [f"row {', '.join(dict.fromkeys(rows))}: {error}" for error, rows in wrong.items()]
    mistakes += _lost(file, cells) if not only or not any(cell.columns for cell in cells) else []
    same = _same(cells)
    if base is None and not columns:
        mistakes += [f"rows {other!r} and {row!r} are the same" for row, other in same.items()]
    if mistakes:
        raise refused(path, mistakes)
    left = [cell for cell in cells if cell.row not in same]
    own = {cell.row: None for cell in left if base is not None and "base" in names[cell.row]}
    return Table(path, file, left, same, list(own))


def _chosen(path: Path, what: str, asked: list[str], names: list[str]) -> list[str]:
    """The names, in their order, that are asked for, each by itself or by a pattern."""
    fits = {text: [name for name in names if name == text or fnmatchcase(name, text)] for text in asked}
    if unknown := [text for text, fitting in fits.items() if not fitting]:
        raise ConfigError(f"{path}: no {what} {unknown[0]!r}", f"choose from: {', '.join(names)}")
    return [name for name in names if any(name in fitting for fitting in fits.values())]


def _cell(path: Path, file: TableFile, row: str, seed: int, base: Path | None, more: list[str]) -> Cell:
    own = file.settings()[row]
    config_path = base or Path(own.get("base", file.base))
    if "seed" in own:
        raise ConfigError("seed is set by the table's seeds, not by a row")
    values = {**file.set, **{name: value for name, value in own.items() if name not in OWN}, "seed": seed}
    if wrong := [name for name, value in values.items() if isinstance(value, dict) and "." not in name]:
        raise ConfigError(f"{wrong[0]} is a section: name its settings one by one, as {wrong[0]}.NAME")
    overrides = (*(f"{name}={_yaml(value)}" for name, value in values.items()), *more)
    config = resolved(load(config_path, list(overrides)))
    steps = plan_steps(config)
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
    """The column on another base: at its benchmark, if it has one only."""
    target = column.step.partition("@")[0]
    benchmarks = list(config.eval.benchmarks)
    if not column.graded or len(benchmarks) != 1:
        return column
    less = _elsewhere(column.less, config) if column.less else None
    return Column(f"{target}@{benchmarks[0]}", column.rest, less)


def _lost(file: TableFile, cells: list[Cell]) -> list[str]:
    """What is wrong with columns that none of the cells has."""
    wrong = []
    for name, text in file.columns.items() if cells else ():
        if not any(name in cell.columns for cell in cells):
            steps = cells[0].steps
            if Column.of(text).graded:
                there = [step.removeprefix("eval:") for step in steps if step.startswith("eval:")]
                told = f"evaluated are {', '.join(there) or 'nothing'}"
            else:
                told = f"steps are {', '.join(step for step in steps if not step.startswith('eval:'))}"
            wrong.append(f"column {name!r}: no row has {text}; {told}")
    return wrong


def _same(cells: list[Cell]) -> dict[str, str]:
    """Rows that show the same artifacts as an earlier row, with that row."""
    seen: dict[str, str] = {}
    same = {}
    for cell in cells:
        shown = tuple(
            (name, cell.config.root, [(cell.steps[part.step].key, part.rest) for part in column.parts])
            for name, column in cell.columns.items()
        )
        other = seen.setdefault(f"{cell.seed} {shown}", cell.row)
        if other != cell.row:
            same[cell.row] = other
    return same
