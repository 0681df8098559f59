"""Splits a file of rows for `lorapar init`: rows to train on, and rows to evaluate on."""

from __future__ import annotations

import random
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages.config import BenchmarkSection, SourceSection
from stages.data import formats
from stages.data.formats import EmptyRowError
from stages.data.rows import raw_rows, read_rows
from stages.errors import DataError
from stages.init.data_profile import answer_kind, benchmark_of
from stages.records import write_jsonl
from stages.store.whole_files import whole_files

ONE_IN, MOST = 5, 300
"""One question of so many is held out, and no more than so many questions in all."""


@dataclass(frozen=True)
class HeldOut:
    train: str
    """The file of the rows to train on: the original one if nothing is held out."""
    test: BenchmarkSection | None
    """Benchmark of the rows to evaluate on; None if no row has an answer that a benchmark can verify."""


def hold_out(path: str, folder: Path, written: list[Path], title: str = "") -> HeldOut:
    """Write both parts into `folder`, as NAME-train.jsonl and NAME-test.jsonl.

    NAME is `title` or, if that is empty, the file's own name. `written` gets those that were not there.

    The rows of one question stay together, and only questions of which each row has a verifiable answer are
    held out. The same file is split in the same way. OutputError if another file has one of the two names.
    """
    source = SourceSection(path=path, empty="drop", duplicates="first")
    examples = read_rows(source).examples  # it raises an error for a bad row
    unverifiable = {example.conversation for example in examples if answer_kind(example) == "none"}
    rows = raw_rows(source)
    kind = formats.detect(path, rows[0][1])
    questions = {}
    for number, row in rows:
        with suppress(EmptyRowError):
            questions[number] = formats.examples(kind, row)[-1].conversation
    verifiable = [q for q in dict.fromkeys(questions.values()) if q not in unverifiable]
    size = min(MOST, len(verifiable) // ONE_IN)
    chosen = set(random.Random(0).sample(verifiable, size))
    parts: dict[str, list[dict[str, Any]]] = {"train": [], "test": []}
    for number, row in rows:
        parts["test" if questions.get(number) in chosen else "train"].append(row)
    if not chosen:
        return HeldOut(path, None)
    files = {name: folder / f"{title or stem(path)}-{name}.jsonl" for name in parts}
    written += [file for file in files.values() if not file.exists()]
    with whole_files(list(files.values()), "write elsewhere: --out FOLDER/rows.yaml") as new:
        for file, part in zip(new, parts.values(), strict=True):
            write_jsonl(file, part)
    try:
        return HeldOut(str(files["train"]), benchmark_of(str(files["test"])))
    except DataError:  # such as functions with tests that are not in HumanEval's form
        for file in files.values():
            file.unlink()
        written[:] = [file for file in written if file.exists()]
        return HeldOut(path, None)


def stem(path: str) -> str:
    """The name of a file without its extensions."""
    return Path(path).name.split(".")[0]
