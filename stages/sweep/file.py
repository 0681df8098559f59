"""The YAML file of a table: rows of settings on a base config, seeds, and what each column shows."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import AfterValidator, BeforeValidator, ValidationError, model_validator

from stages.config.fields import Section, WithoutFalse, setting
from stages.config.loading import read_with_extends
from stages.errors import ConfigError, LoraparError, MissingInputError, validation_messages

SYSTEMS, FLEXIBLE = ("system1", "system2"), "flexible"
"""Qualifiers that may follow `TARGET@BENCHMARK.`, beside FIELD=VALUE."""
SEED = "{seed}"
"""Placeholder for the seed of a cell in the texts of settings, such as paths of data."""


@dataclass(frozen=True)
class Column:
    """A parsed column: an accuracy, or a value of a step's summary."""

    step: str
    qualifier: str
    """Text after the step: a group of items, `flexible`, or the dotted path of the value in the summary."""

    @classmethod
    def from_text(cls, text: str) -> Self:
        step, _, qualifier = text.partition(".")
        return cls(f"eval:{step}" if "@" in text else step, qualifier)

    @property
    def graded(self) -> bool:
        return self.step.startswith("eval:")


def _can_be_shown(text: str) -> str:
    """Return a column's text; ValueError unless it is one of the forms that `TableFile.columns` describes."""
    column = Column.from_text(text)
    if not column.graded and not column.qualifier:
        raise ValueError(f"{text!r}: expected TARGET@BENCHMARK or STEP.VALUE")
    _, group, value = column.qualifier.partition("=")
    known = value.rpartition(".")[2] != FLEXIBLE if group else column.qualifier in ("", FLEXIBLE, *SYSTEMS)
    if column.graded and not known:
        choice = f"expected {', '.join(SYSTEMS)}, FIELD=VALUE or {FLEXIBLE}"
        raise ValueError(f"{text!r}: unknown group {column.qualifier!r}; {choice}")
    return text


ColumnText = Annotated[str, AfterValidator(_can_be_shown)]


class TableRow(Section, extra="allow"):
    """Settings of a row, by their dotted names, and what it has in place of the table's."""

    base: str | None = setting(None, "Config in place of the table's base.")
    columns: dict[str, ColumnText | None] = setting({}, "Columns of this row; null: it has no such column.")

    @property
    def settings(self) -> dict[str, Any]:
        return self.model_extra or {}


class Compare(Section):
    row: str | None = setting(None, "Row that is compared. None: all others, one by one.")
    against: str = setting(..., "Row that it is compared with.")
    on: str = setting(..., "Column of accuracies.")

    @model_validator(mode="before")
    @classmethod
    def _on(cls, section: Any) -> Any:
        if not isinstance(section, dict):
            return section
        # YAML 1.1 reads a bare `on` as true.
        return {"on" if key is True else key: value for key, value in section.items()}


_listed = BeforeValidator(
    lambda value: [value] if isinstance(value, dict) else value,
    json_schema_input_type=Compare | list[Compare],
)


_one_seed = BeforeValidator(
    lambda value: [value] if isinstance(value, int) else value, json_schema_input_type=int | list[int]
)


class Plot(Section):
    """A row called `SERIES: …` is a point of its series; one without a colon is a horizontal line."""

    x: str = setting(..., "Column with the x value of a point, such as a share of elements.")
    y: str = setting(..., "Column of accuracies.")


class TableFile(Section):
    title: str = setting(..., "Title of the table.")
    base: str = setting(..., "Config of every cell, as a path relative to the file that names it.")
    set: dict[str, Any] = setting({})
    """Settings of every cell, by their dotted names. {seed} in a text, here or in a row, is the seed."""
    rows: Annotated[dict[str, TableRow], WithoutFalse] = setting(..., min_length=1)
    """Settings of each row, by their dotted names; `base` and `columns` override the table's."""
    seeds: Annotated[list[int], _one_seed] = setting([])
    """Each row is run with each of these seeds; without any, with that of the base."""
    columns: dict[str, ColumnText] = setting(..., min_length=1)
    """What each column shows. An accuracy: TARGET@BENCHMARK, followed by .system1, .system2 or .FIELD=VALUE
    for a group of items, or by .flexible to parse answers flexibly. Or a value of a step's summary, such as
    partition:sft.active_share."""
    paper: Annotated[dict[str, dict[str, float]], WithoutFalse] = setting({})
    """Published values, by row and column."""
    compare: Annotated[list[Compare], _listed] = setting([])
    """Test each row against one row, paired by item and seed; or a list of planned comparisons. p-values are
    corrected for their number."""
    plot: Plot | None = setting(None, "Plot one column over another.")
    importance: bool = setting(False)
    """Plot, for each row, the importance of its elements for System 1 against that for System 2."""
    notes: str = setting("", "Notes for the reader.")
    chosen_on: str = setting("")
    """Settings that were chosen by results on items, and on which: a sentence under the table."""

    def mistakes(self) -> Iterator[str]:
        """Yield a message for each reference between parts of the file that does not hold."""
        rows, columns = self.rows, self.columns
        for row, values in self.paper.items():
            if row not in rows:
                yield f"paper has values for {row!r}, which is not a row"
            for column in values.keys() - columns.keys():
                yield f"paper has a value of {row!r} for {column!r}, which is not a column"
        for compare in self.compare:
            for name, compared in (("against", compare.against), ("row", compare.row)):
                if compared is not None and compared not in rows:
                    yield f"compare.{name} {compared!r} is not a row"
            if compare.row == compare.against:
                yield f"compare.row {compare.row!r} is compared with itself"
        if self.plot and self.plot.x not in columns:
            yield f"plot.x {self.plot.x!r} is not a column"
        accuracies = [("compare.on", compare.on) for compare in self.compare]
        accuracies += [("plot.y", self.plot.y)] if self.plot else []
        for name, column in accuracies:
            if "@" not in columns.get(column, ""):
                yield f"{name} {column!r} is not a column of accuracies"
        for row, column in itertools.product(rows, dict.fromkeys(column for _, column in accuracies)):
            if (text := rows[row].columns.get(column)) and "@" not in text:
                yield f"row {row!r}: its column {column!r} is compared or plotted: it must be an accuracy"


def is_table(path: Path) -> bool:
    """True if a file is a table (it has columns), not a config; also if it cannot be read."""
    try:
        return "columns" in read_with_extends(path)
    except (OSError, LoraparError):
        return True


def read(path: Path) -> TableFile:
    """Read and check a table file. Like a config, it may extend another one."""
    if not path.is_file():
        raise MissingInputError(f"no table file {path}", "an example: lorapar init --example tables/theta")
    if not is_table(path):
        raise ConfigError(f"{path} is a config, not a table: it has no columns", f"lorapar run {path}")
    try:
        file = TableFile.model_validate(read_with_extends(path, _resolve_bases))
    except ValidationError as error:
        raise mistakes_error(path, validation_messages(error)) from None
    if mistakes := list(file.mistakes()):
        raise mistakes_error(path, mistakes)
    return file


def _resolve_bases(path: Path, table: dict[str, Any]) -> dict[str, Any]:
    """Prefix each `base` with the folder of its file, so that it still holds in a file that extends it."""
    rows = table.get("rows")
    for section in (table, *(rows.values() if isinstance(rows, dict) else ())):
        if isinstance(section, dict) and isinstance(section.get("base"), str):
            section["base"] = str(path.parent / section["base"])
    return table


def mistakes_error(path: Path, mistakes: list[str], hint: str | None = None) -> ConfigError:
    number = "1 mistake" if len(mistakes) == 1 else f"{len(mistakes)} mistakes"
    return ConfigError("\n  ".join([f"{path}: {number}", *mistakes]), hint)
