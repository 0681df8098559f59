"""Splits a file of rows for `lorapar init`: rows to train on, and rows to evaluate on."""

from __future__ import annotations

import random
from contextlib import suppress
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
HINT = "write elsewhere: --out FOLDER/rows.yaml"


def hold_out(path: str, name: str, written: list[Path]) -> tuple[str, BenchmarkSection | None]:
    """Write NAME-train.jsonl and NAME-test.jsonl; return the first, and a benchmark of the second.

    The rows of one question stay together, and only questions of which each row has a verifiable answer are
    held out. If there are none, or no benchmark can read them, it is `path` and None. The same file is split
    in the same way. OutputError if another file has one of the two names. name: with its folder. written:
    gets those that were not there.
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
    chosen = set(random.Random(0).sample(verifiable, min(MOST, len(verifiable) // ONE_IN)))
    if not chosen:
        return path, None
    train, test = [Path(f"{name}-{part}.jsonl") for part in ("train", "test")]
    parts: dict[Path, list[dict[str, Any]]] = {train: [], test: []}
    for number, row in rows:
        parts[test if questions.get(number) in chosen else train].append(row)
    written += [file for file in parts if not file.exists()]
    with whole_files(list(parts), HINT) as drafts:
        for draft, part in zip(drafts, parts.values(), strict=True):
            write_jsonl(draft, part)
    try:
        return str(train), benchmark_of(str(test))
    except DataError:  # such as functions with tests that are not in HumanEval's form
        for file in parts:
            file.unlink()
        written[:] = [file for file in written if file.exists()]
        return path, None
