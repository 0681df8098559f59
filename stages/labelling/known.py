"""Known labels, from a field of the rows or from a file."""

import logging
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

from stages.config import BenchmarkSection, ClassifySection
from stages.data.files import read_file
from stages.data.formats import instruction
from stages.errors import DataError
from stages.records import Example, Labelled, data_error, from_json, read_bytes

log = logging.getLogger(__name__)

KEYS = ("id", "question", "prompt", "instruction")
"""Fields by which a line of a file names its example."""


def with_known_labels(
    examples: list[Example], field: str, file: str | Path | None, required: bool = True
) -> list[Labelled]:
    """Label each example from its own field, or from the file; undecided where there is no label.

    The file is one JSON object, id or question → label, or JSON Lines or CSV with one of KEYS and `field`. An
    id is that of lorapar's artifacts. Where labels are `required`, it may be the field `id` of a row whose
    question the file lacks; other rows, such as test items, are often numbered alike. A label is 1 or 2, also
    as `System 1`. Raises DataError with every label that is something else, with every example that has both
    labels, and if labels are `required` and there is none.
    """
    of_rows = ((e.id, e.extra[field]) for e in examples if field in e.extra)
    values = _read(Path(file), field) if file else list(of_rows)
    where = str(file) if file else f"the field {field}"
    parsed = [(key, value, system_of(value)) for key, value in values if value is not None]
    if wrong := [f"{key[:60]}: {value!r}" for key, value, system in parsed if system is None]:
        raise data_error(f"label in {where} that is neither 1 nor 2", wrong)
    systems: dict[str, set[int]] = {}
    for key, _, system in parsed:
        systems.setdefault(key, set()).add(system or 0)
    key_of = {}
    for example in examples:
        row_id = example.extra.get("id") if required else None
        row_ids = [str(row_id)] if row_id is not None else []
        keys = [key for key in (example.id, example.conversation.strip(), *row_ids) if key in systems]
        key_of[example.id] = min(keys, key=lambda key: len(systems[key]) > 1, default=None)
    if ambiguous := sorted({key[:60] for key in key_of.values() if key and len(systems[key]) > 1}):
        raise data_error(f"row with both labels in {where}", ambiguous)
    rows = [Labelled(e, min(systems[match]) if (match := key_of[e.id]) else None, {}) for e in examples]
    unlabelled = sum(row.system is None for row in rows)
    if required and unlabelled == len(rows):
        hint = "a JSON object of id or question → 1 or 2" if file else "classify.known names the field"
        raise DataError(f"no label for any of {len(rows)} examples in {where}", hint)
    if unlabelled:
        message = "%d of %d examples have no label in %s: they stay undecided"
        log.warning(message, unlabelled, len(rows), where)
    return rows


def known_labels(
    examples: list[Example], classify: ClassifySection, benchmark: BenchmarkSection | None = None
) -> list[Labelled]:
    """The known labels of training rows, which need some, or of a benchmark's items, if it brings them."""
    brings_labels = benchmark is not None and benchmark.brings_labels
    file = None if brings_labels else classify.labels_file
    return with_known_labels(examples, classify.known, file, brings_labels or benchmark is None)


def system_of(value: Any) -> int | None:
    """Parse a label, a number or words such as `System 2`; None if it is neither 1 nor 2."""
    match = re.fullmatch(r"\s*(?:system\s*)?([12])(?:\.0)?\s*", str(value), re.IGNORECASE)
    return int(match[1]) if match else None


def _read(path: Path, field: str) -> list[tuple[str, Any]]:
    """The keys of a file, each with its unparsed label; a line with several KEYS has it under each."""
    if path.name.lower().removesuffix(".gz").endswith(".json"):
        labels = None
        with suppress(ValueError, RecursionError):  # JSON Lines, a list, or broken: `read_file` says what
            labels = from_json(read_bytes(path).decode("utf-8-sig"))
        if isinstance(labels, dict) and field not in labels:
            return [(str(key).strip(), value) for key, value in labels.items()]
    pairs, bad = [], []
    for number, row in read_file(path):
        if isinstance(row.get("instruction"), str):
            row = {**row, "instruction": instruction(row)}
        keys = [str(row[name]).strip() for name in KEYS if isinstance(row.get(name), str | int)]
        if field not in row or not (keys or {None, ""} & {row.get(name, 0) for name in KEYS}):
            bad.append(f"{path}:{number}")
        pairs += [(key, row.get(field)) for key in keys]
    if bad:
        raise data_error(f"line without {field} or without one of {', '.join(KEYS)}", bad)
    return pairs
