"""Labels that a person brings: a field of the rows, or a file."""

from __future__ import annotations

import csv
import json
import logging
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from stages.data.rows import instruction
from stages.errors import DataError
from stages.records import Example, Labelled, problems, read_jsonl

log = logging.getLogger(__name__)

KEYS = ("id", "question", "prompt", "instruction")
"""Fields by which a line of a file names its example."""


def labelled(examples: list[Example], field: str, file: Path | None, needed: bool = True) -> list[Labelled]:
    """Each example with its label from its own field, or from the file; undecided where there is none.

    The file is one JSON object, id or question → label, or JSON Lines or CSV with one of KEYS and `field`. An
    id is that of lorapar's artifacts, or the row's own field `id`. A label is 1 or 2, also as `System 1`.
    DataError lists every one that is something else or contradicts another, and says if labels are `needed`
    and there is none.
    """
    given = _of_file(file, field) if file else [(e.id, e.extra[field]) for e in examples if field in e.extra]
    where = str(file) if file else f"the field {field}"
    found: dict[str, set[int]] = {}
    wrong = []
    for key, value in given:
        if system := system_of(value):
            found.setdefault(key, set()).add(system)
        elif value is not None:
            wrong.append(f"{key[:60]}: {value!r}")
    if wrong:
        raise problems(f"label in {where} that is neither 1 nor 2", wrong)
    names = {e.id: next((name for name in _names(e) if name in found), None) for e in examples}
    if twice := sorted({name[:60] for name in names.values() if name and len(found[name]) > 1}):
        raise problems(f"row with both labels in {where}", twice)
    rows = [Labelled(e, min(found[name]) if (name := names[e.id]) else None, {}) for e in examples]
    without = sum(row.system is None for row in rows)
    if needed and without == len(rows):
        hint = "a JSON object of id or question → 1 or 2" if file else "name it: classify.known"
        raise DataError(f"no label for any of {len(rows)} examples in {where}", hint)
    if without:
        log.warning("%d of %d examples have no label in %s: they stay undecided", without, len(rows), where)
    return rows


def _names(example: Example) -> list[str]:
    """By which a file may name an example, the surest first."""
    own = example.extra.get("id")
    return [example.id, *([str(own)] if own is not None else []), example.prompt.strip()]


def system_of(value: Any) -> int | None:
    """1 or 2 if a label says so, as a number or in words: `2`, `System 2`."""
    match = re.fullmatch(r"\s*(?:system\s*)?([12])(?:\.0)?\s*", str(value), re.IGNORECASE)
    return int(match[1]) if match else None


def _of_file(path: Path, field: str) -> list[tuple[str, Any]]:
    if path.suffix == ".json":
        try:
            given = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise DataError(f"{path} is not JSON: {error}") from None
        if not isinstance(given, dict):
            raise DataError(f"{path} must hold one object, got {type(given).__name__}")
        return [(str(key).strip(), value) for key, value in given.items()]
    return list(_lines(path, field))


def _lines(path: Path, field: str) -> Iterable[tuple[str, Any]]:
    bad = []
    for number, row in _csv(path) if path.suffix == ".csv" else read_jsonl(path):
        if isinstance(row.get("instruction"), str):
            row = {**row, "instruction": instruction(row)}
        keys = [str(row[name]).strip() for name in KEYS if isinstance(row.get(name), str | int)]
        if not keys or field not in row:
            bad.append(f"{path}:{number}")
        yield from ((key, row.get(field)) for key in keys)
    if bad:
        raise problems(f"line without {field} or without one of {', '.join(KEYS)}", bad)


def _csv(path: Path) -> list[tuple[int, dict[str, Any]]]:
    """The rows of a file with names in its first line, with the numbers of the lines that they end in.

    An empty cell is none.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            return [(reader.line_num, {name: cell or None for name, cell in row.items()}) for row in reader]
    except (csv.Error, UnicodeDecodeError) as error:
        raise DataError(f"{path} is not CSV: {error}") from None
