"""Rows of a person's own file, for `lorapar init`: columns by other names, and a part to evaluate on."""

import random
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from stages import escaping
from stages.config import BenchmarkSection, SourceSection
from stages.data import formats
from stages.data.files import stem
from stages.data.formats import EmptyRowError
from stages.data.rows import local_file, raw_rows, read_rows
from stages.errors import ConfigError, DataError
from stages.init.data_profile import answer_kind, benchmark_of, question
from stages.init.final_answers import final_answer
from stages.labelling.known import system_of
from stages.prompts.answers import is_answer
from stages.records import write_jsonl
from stages.store.whole_files import whole_files

NAMES = {
    "question": ("question", "prompt", "instruction", "query", "problem", "input", "text", "user", "q"),
    "answer": (
        "answer", "response", "completion", "output", "reply", "solution", "target", "expected", "assistant",
        "label", "a",
    ),
}  # fmt: skip
"""Field of a row → names that people give it, the most usual first; case and outer spaces do not count.

The last word of a name counts as well: `User Question`.
"""
GOLDS = ("gold", "final_answer", "ground_truth", "correct_answer", "expected_answer")
"""Names of a column with the final answer alone; the column of `answer` is one beside a column of WORKED."""
WORKED = ("solution", "rationale", "explanation", "reasoning", "working")
SHARE = 0.8
"""Share of the rows whose answers must be short ones, or none is read from them."""
ONE_IN, MOST = 5, 300
"""One question of so many is held out, and no more than so many questions in all."""
HINT = "write elsewhere: --out FOLDER/rows.yaml"


@dataclass(frozen=True)
class OwnRows:
    path: str
    """The file to go on with: the person's own, or the one that was written."""
    columns: dict[str, str] = field(default_factory=dict)
    """Field → column, where they have other names."""
    golds: list[tuple[str, str]] = field(default_factory=list)
    """The texts of rows from which a final answer was read, with it."""
    unread: str = ""
    """Why no final answers were read, although some rows seem to have one."""


def own_rows(path: str, folder: Path, columns: Mapping[str, str], written: list[Path]) -> OwnRows:
    """Write the rows into `folder` as NAME-rows.jsonl if a stage could not read them, or their answers.

    columns: field → column, as the person says. ConfigError if there is no such column, DataError if the
    columns say nothing. A data set of the hub stays as it is. written: gets that file, unless it was there.
    """
    if local_file(source := SourceSection(path=path)) is None:
        if columns:
            raise ConfigError(f"--columns: {path} is no file", "it names the columns of a file")
        return OwnRows(path)
    rows = [row for _, row in raw_rows(source)]
    renamed = _with_worked(rows[0], _columns(path, rows[0], columns), columns)
    # Fields come last: a column that has the name of one of them, and is another, gives way.
    rows = [
        {name: value for name, value in row.items() if name not in renamed}
        | {name: row[column] for column, name in renamed.items() if column in row}
        for row in rows
    ]
    names = {name: column for column, name in renamed.items()}
    odd = {str(row.get("system")) for row in rows if "system" in columns and not system_of(row.get("system"))}
    if odd:
        problem = f"--columns system={columns['system']}: a label is {min(odd)!r}, neither 1 nor 2"
        raise DataError(problem, "write 1 (answered at once) or 2 (worked out) into that column")
    golds, unread = _golds(formats.detect(path, rows[0]), rows)
    if not names and not golds:
        return OwnRows(path, unread=unread)
    for number, (_, gold) in golds.items():
        rows[number]["gold"] = gold
    file = folder / f"{stem(path)}-rows.jsonl"
    written += [] if file.exists() else [file]
    with whole_files([file], HINT) as (draft,):
        write_jsonl(draft, rows)
    return OwnRows(str(file), names, list(golds.values()), unread)


def _columns(path: str, row: Mapping[str, Any], named: Mapping[str, str]) -> dict[str, str]:
    """Column → field of those that have another name, as said or else by NAMES; none if all are known."""
    by_name = {name.strip().casefold().replace(" ", "_"): name for name in row}
    chosen = {}
    for name, column in named.items():
        if (original := by_name.get(column.strip().casefold().replace(" ", "_"))) is None:
            raise ConfigError(
                f"--columns {name}={column}: no such column", f"those of {path}: {', '.join(row)}"
            )
        chosen[original] = name
    free = {name: column for name, column in by_name.items() if column not in chosen}
    gold = next((free[name] for name in GOLDS if name in free), None)
    try:
        formats.detect(path, {chosen.get(name, name): value for name, value in row.items()})
        return chosen | ({gold: "gold"} if gold not in (None, "gold") and "gold" not in named else {})
    except DataError as error:
        columns = {name: column for column, name in chosen.items()}
        worked = next((free[name] for name in WORKED if name in free), None)
        if worked and "answer" in free and gold is None and not {"answer", "gold"} & set(columns):
            columns["answer"], gold = worked, free["answer"]
        by_last_word = {name.rpartition("_")[2]: column for name, column in free.items()}
        for name, usual in NAMES.items():
            if present := [
                names[other] for names in (free, by_last_word) for other in usual if other in names
            ]:
                columns.setdefault(name, present[0])
        if gold:
            columns.setdefault("gold", gold)
        if "question" not in columns or not {"answer", "gold"} & set(columns):
            guess = row if len(row) == 2 else ("NAME", "NAME")
            raise DataError(
                f"{path}: which column asks, and which answers? It has {', '.join(row)}",
                "--columns question={},answer={}".format(*map(escaping.shell, guess)),
            ) from error
        return {column: name for name, column in columns.items()}


def _with_worked(
    row: Mapping[str, Any], renamed: Mapping[str, str], named: Mapping[str, str]
) -> dict[str, str]:
    """Column → field, where a column that a person calls by a name of WORKED holds the answer worked out.

    The other answer is then the final one, unless there is a `gold`.
    """
    fields = {name: column for column, name in renamed.items()}
    if worked := next((name for name in WORKED if name in named), None):
        if "gold" not in {*row, *fields}:
            fields["gold"] = fields.get("answer", "answer")
        fields["answer"] = fields.pop(worked)
    return {column: name for name, column in fields.items()}


def _golds(kind: str, rows: list[dict[str, Any]]) -> tuple[dict[int, tuple[str, str]], str]:
    """Row → its response and the final answer in it; none, and why, if fewer than SHARE of the rows have one.

    kind: the format of the rows. None are needed where each response is its answer: `read_rows` knows that by
    itself.
    """
    texts, verifiable = {}, 0
    for number, row in enumerate(rows):
        if row.get("gold") is not None:
            continue
        try:
            example = formats.example(kind, row)
        except (ValueError, DataError):
            continue  # `read_rows` says what is wrong with it
        verifiable += example.gold not in (None, example.response)  # a number is an answer as it stands
        if example.response and example.gold is None:
            texts[number] = example.response.strip()
    if verifiable or all(map(is_answer, texts.values())):
        return {}, ""
    golds = {n: (text, gold) for n, text in texts.items() if (gold := final_answer(text))}
    if len(golds) >= SHARE * len(texts):
        return golds, ""
    first = next(text for n, text in texts.items() if n not in golds)
    few = f"a final answer can be read from {len(golds)} of {len(texts)} rows, too few to use any"
    return {}, f"{few}; not, for example, from: {first}"


def hold_out(
    path: str, name: str, written: list[Path], again: bool = False
) -> tuple[str, BenchmarkSection | None]:
    """Write NAME-train.jsonl and NAME-test.jsonl; return the first, and a benchmark of the second.

    The rows of one `question` stay together, and only questions of which each row has a verifiable answer are
    held out. If there are none, or no benchmark can read them, it is `path` and None. The same file is split
    in the same way. OutputError if another file has one of the two names, unless they are made `again`: then
    each question stays in its file, and new ones are divided. name: with its folder. written: gets those that
    were not there.
    """
    source = SourceSection(path=path, empty="drop", duplicates="first")
    examples = read_rows(source).examples  # it raises an error for a bad row
    unverifiable = {question(example) for example in examples if answer_kind(example) == "none"}
    rows = _rows(path)
    questions = _questions(rows)
    train, test = [Path(f"{name}-{part}.jsonl") for part in ("train", "test")]
    trained, held = (set(_questions(_rows(str(file))) if again else ()) for file in (train, test))
    verifiable = [q for q in dict.fromkeys(questions) if q and q not in unverifiable]
    chosen = {q for q in verifiable if q in held}
    fresh = [q for q in verifiable if q not in trained and q not in held]
    lacking = max(0, min(MOST, len(verifiable) // ONE_IN) - len(chosen))
    chosen |= set(random.Random(0).sample(fresh, min(lacking, len(fresh))))
    if not chosen:
        return path, None
    parts: dict[Path, list[dict[str, Any]]] = {train: [], test: []}
    for row, asked in zip(rows, questions, strict=True):
        parts[test if asked in chosen else train].append(row)
    absent = [file for file in parts if not file.exists()]
    try:
        with whole_files(list(parts), HINT, replace=again) as drafts:
            for draft, part in zip(drafts, parts.values(), strict=True):
                write_jsonl(draft, part)
            benchmark = benchmark_of(str(drafts[1]))
    except DataError:  # such as functions with tests that are not in HumanEval's form
        return path, None
    written += absent
    return str(train), benchmark.model_copy(update={"path": str(test)})


def make_again(path: str, train: str, columns: Mapping[str, str]) -> str:
    """Write `train`, and what is held out beside it, from the changed rows at `path`; say what changed.

    train: a file that `hold_out` or `own_rows` wrote; ConfigError if its name says otherwise.
    """
    named = re.fullmatch(r"(.+)-(train|rows)\.jsonl", train)
    if named is None or Path(path).resolve() == Path(train).resolve():
        raise ConfigError(f"data.path is {train}, no file that init wrote", "change that file itself")
    name, is_divided = named[1], named[2] == "train"
    files = [train, f"{name}-test.jsonl"] if is_divided else [train]
    before = [row for file in files for row in _rows(file)]
    with TemporaryDirectory() as scratch:
        own = own_rows(path, Path(scratch), columns, [])
        after = _rows(own.path)
        if not is_divided:
            read_rows(SourceSection(path=own.path, empty="drop", duplicates="first"))  # refuses bad rows
            with whole_files([Path(train)], replace=True) as (draft,):
                write_jsonl(draft, after)
        elif hold_out(own.path, name, [], again=True)[1] is None:
            raise DataError(f"{path}: no question can be held out any more", own.unread or None)
    old, new = (Counter(zip(_questions(rows), map(str, rows), strict=True)) for rows in (before, after))
    gone, more = (Counter(asked for asked, _ in rows.elements()) for rows in (old - new, new - old))
    changes = f"{(more & gone).total()} changed, {(gone - more).total()} gone"
    return f"{(more - gone).total()} rows more, {changes}"


def _rows(file: str) -> list[dict[str, Any]]:
    return [row for _, row in raw_rows(SourceSection(path=file))]


def _questions(rows: list[dict[str, Any]]) -> list[str]:
    """The `question` of each row, empty for an empty row."""
    kind, questions = formats.detect("rows", rows[0]), []
    for row in rows:
        try:
            questions.append(question(formats.example(kind, row)))
        except EmptyRowError:
            questions.append("")
    return questions
