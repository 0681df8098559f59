"""Reads files of rows: JSON Lines, a JSON list, CSV, TSV and Parquet."""

import csv
import io
import json
from collections import Counter
from collections.abc import Iterable
from decimal import Decimal
from pathlib import Path
from typing import Any

from stages.errors import DataError
from stages.records import MAX_LINE_BYTES, data_error, first_bytes, from_json, read_bytes, read_jsonl

SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".gz")
"""Ends of names by which a path is a file's and no hub id."""
ZIPPED = b"PK\x03\x04"
"""Begins a zip archive, such as a file of Excel's."""
Rows = list[tuple[int, dict[str, Any]]]
"""Each row with its number: the line in JSON Lines and CSV, else counted from 1."""


def stem(path: str) -> str:
    """The name of a file without all that follows its first dot."""
    return Path(path).name.partition(".")[0]


def read_file(path: Path) -> Rows:
    """Read the rows of a file by its name, gzipped or not (but Parquet); `[` begins a list in JSON."""
    name = path.name.lower().removesuffix(".gz")
    start = first_bytes(path).removeprefix(b"\xef\xbb\xbf").lstrip()
    if start.startswith(ZIPPED) or name.endswith((".xlsx", ".xls", ".ods")):
        raise DataError(f"{path} is a spreadsheet or an archive, not rows", "save its sheet as CSV (UTF-8)")
    if name.endswith(".parquet") or start.startswith(b"PAR1"):
        rows = _parquet(path)
    elif name.endswith((".csv", ".tsv")):
        rows = _csv(path, "\t" if name.endswith(".tsv") else ",")
    elif name.endswith(".json") or start.startswith(b"["):
        rows = _json(path)
    else:
        return read_jsonl(path)
    if not rows:
        raise DataError(f"{path} has no rows")
    return rows


def _json(path: Path) -> Rows:
    """Read a list of objects, or JSON Lines under the name of JSON."""
    text = _text(path)
    try:
        rows = from_json(text)
    except (ValueError, RecursionError) as error:
        if text.lstrip().startswith("{"):
            return read_jsonl(path)
        raise DataError(f"{path} is not JSON: {error}") from None
    if isinstance(rows, dict):
        lists = [name for name, value in rows.items() if isinstance(value, list)]
        hint = f"its field {lists[0]} is a list: write that alone into a file" if lists else None
        raise DataError(f"{path} is one object, not a list of rows", hint)
    if not isinstance(rows, list):
        raise DataError(f"{path} is not a list of rows")
    if odd := [(n, type(row).__name__) for n, row in enumerate(rows, 1) if not isinstance(row, dict)]:
        raise data_error("bad row", [f"{path}:{n}: expected an object, got {kind}" for n, kind in odd])
    return list(enumerate(rows, 1))


def _csv(path: Path, delimiter: str) -> Rows:
    """Read a table whose first line names the fields; an empty cell is None."""
    csv.field_size_limit(MAX_LINE_BYTES)
    text = _text(path)
    head = text.lstrip().partition("\n")[0]
    others = [mark for mark in ",\t;" if mark in head]
    if delimiter not in head and len(others) == 1:  # such as Excel's ; where the comma is the decimal point
        [delimiter] = others
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    rows: Rows = []
    bad: list[str] = []
    try:
        names = [name.strip() for name in next((line for line in reader if any(line)), [])]
        if repeated := [name for name, times in Counter(names).items() if name and times > 1]:
            raise DataError(f"{path}: two columns are called {repeated[0]!r}")
        for values in reader:
            if not any(values):  # a row that only has a format in the spreadsheet
                continue
            if len(values) == len(names):
                cells = zip(names, values, strict=True)
                rows.append((reader.line_num, {name: text or None for name, text in cells if name}))
            else:
                problem = f"{len(values)} fields, and the first line names {len(names)}"
                bad.append(f"{path}:{reader.line_num}: {problem}")
    except csv.Error as error:
        raise DataError(f"{path}:{reader.line_num}: broken CSV: {error}") from None
    if bad:
        raise data_error("bad row", bad)
    return rows


def _parquet(path: Path) -> Rows:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise DataError(f"{path} is not a Parquet file: {error}") from None
    return numbered(table)


def numbered(rows: Iterable[dict[str, Any]]) -> Rows:
    """The rows with their numbers, through JSON: dates and the like become text, as in files of text."""
    return [(number, from_json(json.dumps(row, default=_plain))) for number, row in enumerate(rows, 1)]


def _plain(value: Any) -> Any:
    if isinstance(value, bytes):  # text that its writer did not mark as text, as Spark and Impala may
        return value.decode("utf-8", "surrogateescape")
    return (int(value) if value == int(value) else float(value)) if isinstance(value, Decimal) else str(value)


def _text(path: Path) -> str:
    try:
        return read_bytes(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        hint = "save it as UTF-8, or: iconv -f WINDOWS-1252 -t UTF-8"
        raise DataError(f"{path} is not UTF-8: {error.reason} at byte {error.start}", hint) from None
