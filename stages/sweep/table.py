"""The cells of a table, planned: each row with each seed."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path

from stages.config import Config
from stages.config.yaml import on_one_line
from stages.errors import ConfigError, LoraparError, MissingInputError
from stages.pipeline.resolve import load, resolved
from stages.pipeline.steps import Step, plan_steps
from stages.sweep.file import SEED, Column, TableFile, TableRow, mistakes_error, read


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
    """Columns that this cell has a value for."""


@dataclass(frozen=True)
class Contrast:
    """A planned comparison in column `on`: one row minus another."""

    row: str
    against: str
    on: str

    @property
    def title(self) -> str:
        return f"{self.on}: {self.row!r} minus {self.against!r}"


@dataclass(frozen=True)
class Table:
    path: Path
    file: TableFile
    cells: list[Cell]
    base: Path | None = None
    """Config of the command line, in place of all that the file names."""

    @property
    def contrasts(self) -> list[Contrast]:
        """The comparisons whose rows are here."""
        contrasts: dict[Contrast, None] = {}
        for compare in self.file.compare:
            for row in [compare.row] if compare.row else self.rows:
                if {row, compare.against} <= set(self.rows) and row != compare.against:
                    contrasts[Contrast(row, compare.against, compare.on)] = None
        return list(contrasts)

    @property
    def rows(self) -> list[str]:
        return list(dict.fromkeys(cell.row for cell in self.cells))

    def cells_of(self, row: str) -> list[Cell]:
        return [cell for cell in self.cells if cell.row == row]


def table(
    path: Path,
    base: Path | None = None,
    only: list[str] | None = None,
    seeds: list[int] | None = None,
    overrides: list[str] | None = None,
) -> Table:
    """Plan the cells of a table file. One ConfigError lists everything that is wrong with them.

    base: replaces every config that the file names. only: names of rows, or patterns such as `QKV*`.
    overrides: additional `key=value` settings.
    """
    file = read(path)
    if any(text.partition("=")[0].strip() == "seed" for text in overrides or ()):
        raise ConfigError("--set seed: a table has seeds of its own", "--seeds 1,2,3")
    rows = _matching(path, only, list(file.rows)) if only else list(file.rows)
    errors: dict[str, dict[str, None]] = {}
    hints: dict[str, None] = {}
    planned = []
    seeds = seeds or file.seeds or [load(base or Path(file.base), []).seed]
    for seed, row in itertools.product(dict.fromkeys(seeds), rows):
        try:
            planned.append(_cell(path, file, row, seed, base, overrides or []))
        except LoraparError as error:
            errors.setdefault(str(error), {})[repr(row)] = None
            if isinstance(error, MissingInputError) and error.hint:
                hints[error.hint] = None
    mistakes = [f"row {', '.join(names)}: {error}" for error, names in errors.items()]
    mistakes += (
        _unused_columns(file, planned) if not only or not any(cell.columns for cell in planned) else []
    )
    mistakes += _incomparable(file, planned) if base is None else []
    if mistakes:
        raise mistakes_error(path, mistakes, "; ".join(hints) or None)
    return Table(path, file, planned, base)


def _incomparable(file: TableFile, cells: list[Cell]) -> list[str]:
    """Return a message for each row that a comparison names and that has no value in its column.

    Its own columns leave the column out, or its config does not evaluate what the column shows.
    """
    lacking = {(cell.row, name) for cell in cells for name in file.columns if name not in cell.columns}
    named = ((row, entry.on) for entry in file.compare for row in (entry.row, entry.against))
    pairs = dict.fromkeys(pair for pair in named if pair in lacking)
    return [f"compare names row {row!r}, which has no value in column {column!r}" for row, column in pairs]


def _matching(path: Path, patterns: list[str], names: list[str]) -> list[str]:
    """Return the names that a pattern equals or matches; ConfigError if a pattern matches none."""
    chosen = set()
    for pattern in patterns:
        matched = {name for name in names if name == pattern or fnmatchcase(name, pattern)}
        if not matched:
            raise ConfigError(f"{path}: no row {pattern!r}", f"choose from: {', '.join(names)}")
        chosen |= matched
    return [name for name in names if name in chosen]


def _cell(path: Path, file: TableFile, name: str, seed: int, base: Path | None, overrides: list[str]) -> Cell:
    """Plan one cell, of the row of this name.

    Config file: `--base`, else the row's `base`, else the table's. Settings, of which later ones win: config
    file, table's `set`, row, seed, `--set`. The seed replaces SEED in them.
    """
    row = file.rows[name]
    config_path = base or Path(row.base or file.base)
    if "seed" in {**file.set, **row.settings}:
        raise ConfigError("seed is set by the table's seeds, not by a setting of its own")
    merged = {**file.set, **row.settings, "seed": seed}
    if sections := [key for key, value in merged.items() if isinstance(value, dict) and "." not in key]:
        raise ConfigError(f"{sections[0]} is a section: name its settings one by one, as {sections[0]}.NAME")
    texts = (*(f"{key}={on_one_line(value)}" for key, value in merged.items()), *overrides)
    sets = tuple(text.replace(SEED, str(seed)) for text in texts)
    config = resolved(load(config_path, list(sets)))
    steps = plan_steps(config)
    columns = _columns(file, row, config, steps, base is not None)
    return Cell(str(path), name, seed, config_path, sets, config, steps, columns)


def _columns(
    file: TableFile, row: TableRow, config: Config, steps: dict[str, Step], rebased: bool
) -> dict[str, Column]:
    """Return the columns of a cell: the table's, overridden by the row's, as far as the steps produce them.

    row: null removes the table's column; a column that the row names must be produced. rebased: the config is
    the base of the command line, whose benchmark, if it has one alone, takes the place of the named ones.
    """
    if unknown := row.columns.keys() - file.columns.keys():
        raise ConfigError(f"{sorted(unknown)[0]!r} is not a column of the table")
    texts = {**file.columns, **row.columns}
    columns = {name: Column.from_text(text) for name, text in texts.items() if text is not None}
    if rebased and len(config.eval.benchmarks) == 1:
        (benchmark,) = config.eval.benchmarks
        for name, column in columns.items():
            if column.graded:
                target, at, _ = column.step.partition("@")
                columns[name] = replace(column, step=f"{target}{at}{benchmark}")
    produced = {name: column for name, column in columns.items() if column.step in steps}
    if missing := [name for name in row.columns if name in columns and name not in produced]:
        raise ConfigError(
            f"its own column {missing[0]!r} shows {texts[missing[0]]}, which its config does not produce"
        )
    return produced


def _unused_columns(file: TableFile, cells: list[Cell]) -> Iterator[str]:
    """Yield a message for each column that no cell has, with the steps that could be named instead."""
    for name, text in file.columns.items() if cells else ():
        if any(name in cell.columns for cell in cells):
            continue
        evaluations = [step.removeprefix("eval:") for step in cells[0].steps if step.startswith("eval:")]
        others = [step for step in cells[0].steps if not step.startswith("eval:")]
        choice = f"evaluations: {', '.join(evaluations) or 'none'}"
        choice = choice if Column.from_text(text).graded else f"steps: {', '.join(others)}"
        yield f"column {name!r}: no row has {text}; {choice}"
