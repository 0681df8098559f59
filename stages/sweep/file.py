"""The YAML file of a table: rows of settings on a base config, seeds, and what each column shows."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, ValidationError, model_validator

from stages.config.fields import Section, WithoutFalse, setting
from stages.config.loading import read_with_extends
from stages.errors import ConfigError, LoraparError, MissingInputError, validation_messages

ROW_KEYS = ("base", "columns")
"""Keys of a row that are not settings of the config."""
MAX_CELLS = 1000
"""Largest number of cells, unless the user allows more: planning one takes some milliseconds."""
SYSTEMS, FLEXIBLE = ("system1", "system2"), "flexible"
"""Qualifiers that may follow `TARGET@BENCHMARK.`, beside FIELD=VALUE."""


SEED = "{seed}"
"""Placeholder for the seed of a cell in the texts of settings, such as paths of data."""


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


Comparisons = Annotated[
    list[Compare],
    BeforeValidator(
        lambda value: [] if value is None else [value] if isinstance(value, dict) else value,
        json_schema_input_type=Compare | list[Compare] | None,
    ),
]


class Plot(Section):
    """A row called `SERIES: …` is a point of its series; one without a colon is a horizontal line."""

    x: str = setting(..., "Column with the x value of a point, such as a share of elements.")
    y: str = setting(..., "Column of accuracies.")


class TableFile(Section):
    title: str = setting(..., "Title of the table.")
    base: str = setting(..., "Config of every cell, as a path relative to the file that names it.")
    set: dict[str, Any] = setting({})
    """Settings of every cell, by their dotted names. {seed} in a text, here or in a row, is the seed."""
    rows: Annotated[dict[str, dict[str, Any]], WithoutFalse] = setting(..., min_length=1)
    """Settings of each row, by their dotted names; `base` and `columns` override the table's."""
    seeds: list[int] = setting([41], "Each row is run with each of these seeds.", min_length=1)
    make_data: str = setting("")
    """Command that writes the data of a seed, named with {seed}. It is not run, but shown where data are
    missing."""
    columns: dict[str, str] = setting(..., min_length=1)
    """What each column shows. An accuracy: TARGET@BENCHMARK, followed by .system1, .system2 or .FIELD=VALUE
    for a group of items, or by .flexible to parse answers flexibly. A difference of two accuracies, such as
    `rl@demo - sft@demo`. Or a value of a step's summary, such as partition:sft.active_share."""
    paper: Annotated[dict[str, dict[str, float]], WithoutFalse] = setting({})
    """Published values, by row and column."""
    compare: Comparisons = setting([])
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
        rows = self.rows
        yield from filter(None, map(_column_mistake, self.columns.values()))
        for row, settings in rows.items():
            yield from _row_mistakes(row, settings)
        for row, values in self.paper.items():
            if row not in rows:
                yield f"paper has values for {row!r}, which is not a row"
            for column in values.keys() - self.columns.keys():
                yield f"paper has a value of {row!r} for {column!r}, which is not a column"
        for compare in self.compare:
            for name, compared in (("against", compare.against), ("row", compare.row)):
                if compared is not None and compared not in rows:
                    yield f"compare.{name} {compared!r} is not a row"
            if compare.row == compare.against:
                yield f"compare.row {compare.row!r} is compared with itself"
            if not _is_accuracy(self.columns.get(compare.on, "")):
                yield f"compare.on {compare.on!r} is not a column of accuracies"
        if self.plot and self.plot.x not in self.columns:
            yield f"plot.x {self.plot.x!r} is not a column"
        if self.plot and not _is_accuracy(self.columns.get(self.plot.y, "")):
            yield f"plot.y {self.plot.y!r} is not a column of accuracies"
        accuracies = {*(compare.on for compare in self.compare), self.plot and self.plot.y}
        for row, settings in rows.items():
            for name, text in _row_columns(settings).items():
                if name in accuracies and isinstance(text, str) and not _is_accuracy(text):
                    yield f"row {row!r}: its column {name!r} is compared or plotted: it must be an accuracy"

    def select_columns(self, names: list[str]) -> TableFile:
        """Return a copy with these columns only.

        If no compared column is among them, rows are compared on the first accuracy that is, if any.
        """
        columns = {name: text for name, text in self.columns.items() if name in names}
        dropped = self.columns.keys() - columns.keys()
        rows = {row: _without_columns(settings, dropped) for row, settings in self.rows.items()}
        accuracies = [name for name, text in columns.items() if _is_accuracy(text)]
        compare = [comparison for comparison in self.compare if comparison.on in columns]
        if not compare and accuracies:
            compare = [comparison.model_copy(update={"on": accuracies[0]}) for comparison in self.compare]
        plot = self.plot if self.plot and {self.plot.x, self.plot.y} <= columns.keys() else None
        return self.model_copy(update={"columns": columns, "rows": rows, "compare": compare, "plot": plot})


@dataclass(frozen=True)
class Column:
    """A parsed column: an accuracy, a difference of two accuracies, or a value of a step's summary."""

    step: str
    qualifier: str
    """Text after the step: a group of items, `flexible`, or the dotted path of the value in the summary."""
    minus: Column | None = None
    """Accuracy that is subtracted, item by item."""

    @classmethod
    def from_text(cls, text: str) -> Column:
        text, minus, subtrahend = text.partition(" - ")
        if minus:
            return replace(cls.from_text(text), minus=cls.from_text(subtrahend))
        step, _, qualifier = text.partition(".")
        return cls(f"eval:{step}" if "@" in text else step, qualifier)

    @property
    def graded(self) -> bool:
        return self.step.startswith("eval:")

    @property
    def terms(self) -> list[Column]:
        """The column itself, and what is subtracted from it if it is a difference."""
        return [self, self.minus] if self.minus else [self]

    @property
    def steps(self) -> list[str]:
        return [term.step for term in self.terms]


def _is_accuracy(text: str) -> bool:
    """True if a column's text is a single accuracy, not a difference of two."""
    return "@" in text and " - " not in text


def _column_mistake(text: str) -> str | None:
    """Return what is wrong with a column's text, if anything."""
    terms = [Column.from_text(term) for term in text.split(" - ")]
    if len(terms) > 2 or (len(terms) == 2 and not all(term.graded for term in terms)):
        return f"column {text!r}: a difference must be TARGET@BENCHMARK - TARGET@BENCHMARK"
    if any(not term.graded and not term.qualifier for term in terms):
        return f"column {text!r}: expected TARGET@BENCHMARK or STEP.VALUE"
    for term in terms:
        if term.graded and term.qualifier not in ("", FLEXIBLE, *SYSTEMS) and "=" not in term.qualifier:
            choice = f"expected {', '.join(SYSTEMS)}, FIELD=VALUE or {FLEXIBLE}"
            return f"column {text!r}: unknown group {term.qualifier!r}; {choice}"
    return None


def _row_mistakes(row: str, settings: dict[str, Any]) -> Iterator[str]:
    """Check that a row's `base` is a path, and that its `columns` are valid texts, or null for none."""
    if not isinstance(settings.get("base", ""), str):
        yield f"row {row!r}: base must be a path, got {settings['base']!r}"
    columns = settings.get("columns", {})
    if not isinstance(columns, dict) or not all(isinstance(text, str | None) for text in columns.values()):
        yield f"row {row!r}: columns must map names to what they show, or to null, got {columns!r}"
    texts = (text for text in _row_columns(settings).values() if isinstance(text, str))
    yield from filter(None, map(_column_mistake, texts))


def _row_columns(settings: dict[str, Any]) -> dict[str, Any]:
    """The columns that a row overrides; empty if they are malformed."""
    columns = settings.get("columns")
    return columns if isinstance(columns, dict) else {}


def _without_columns(settings: dict[str, Any], dropped: Collection[str]) -> dict[str, Any]:
    """Return a row's settings without its texts for dropped columns, and without an empty `columns`."""
    columns = {name: text for name, text in _row_columns(settings).items() if name not in dropped}
    others = {name: value for name, value in settings.items() if name != "columns"}
    return {**others, **({"columns": columns} if columns else {})}


def is_table(path: Path) -> bool:
    """True if a file is a table (it has columns), not a config; also if it cannot be read."""
    try:
        return "columns" in read_with_extends(path)
    except (OSError, LoraparError):
        return True


def read(path: Path) -> TableFile:
    """Read and check a table file of at most MAX_CELLS rows. Like a config, it may extend another one."""
    if not path.is_file():
        raise MissingInputError(f"no table file {path}", "an example: lorapar init --example tables/theta")
    if not is_table(path):
        raise ConfigError(f"{path} is a config, not a table: it has no columns", f"lorapar run {path}")
    try:
        file = TableFile.model_validate(read_with_extends(path, _resolve_bases))
    except ValidationError as error:
        raise mistakes_error(path, validation_messages(error)) from None
    check_size(path, len(file.rows), 1)
    if mistakes := list(file.mistakes()):
        raise mistakes_error(path, mistakes)
    return file


def check_size(path: Path, rows: int, seeds: int) -> None:
    """Raise ConfigError if so many rows with so many seeds are more than MAX_CELLS cells."""
    if rows * seeds > MAX_CELLS:
        cells = f"{rows:,} rows" + (f" with {seeds:,} seeds" if seeds > 1 else "")
        problem = f"{path}: {cells} are more than {MAX_CELLS:,} cells"
        raise ConfigError(problem, "some of them: --only ROW, --seeds N")


def _resolve_bases(path: Path, table: dict[str, Any]) -> dict[str, Any]:
    """Prefix each `base` with the folder of its file, so that it still holds in a file that extends it."""
    rows = table.get("rows")
    for section in (table, *(rows.values() if isinstance(rows, dict) else ())):
        if isinstance(section, dict) and isinstance(section.get("base"), str):
            section["base"] = str(path.parent / section["base"])
    return table


def mistakes_error(path: Path, mistakes: list[str], hint: str | None = None) -> ConfigError:
    """Combine all mistakes of a file into one error."""
    number = "1 mistake" if len(mistakes) == 1 else f"{len(mistakes)} mistakes"
    return ConfigError("\n  ".join([f"{path}: {number}", *mistakes]), hint)
