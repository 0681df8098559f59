"""Rows of a person's own file, for `lorapar init`: columns by other names, final answers in short texts."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stages.config import SourceSection
from stages.data import formats
from stages.data.rows import local_file, raw_rows
from stages.errors import ConfigError, DataError
from stages.prompts.answers import extract_letter, gold_from_response, is_answer, parse_number
from stages.records import write_jsonl
from stages.store.whole_files import whole_files

NAMES = {
    "question": ("question", "prompt", "instruction", "query", "problem", "input", "text", "user", "q"),
    "answer": (
        "answer", "response", "completion", "output", "reply", "solution", "target", "expected", "assistant",
        "label", "a",
    ),
}  # fmt: skip
"""Field of a row → names that people give it, the most usual first; case and outer spaces do not count."""
QUESTIONS = ("question", "prompt", "instruction")
RESPONSES = ("answer", "completion", "output", "response")
"""Fields of the formats that have a question and a response."""
SHARE = 0.8
"""Share of the rows whose answers must be short ones, or none is read from them."""
WORDS, FEW = 14, 3
"""Most words of a sentence that holds an answer, and of an answer that is one as a whole."""
RULE = (
    "the number or date of a short sentence, or of the last one of a longer text, as in `So 12 are left.`; a "
    "yes or no at the beginning; a letter; or all of at most 3 words"
)
MONTH = "(?:jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec)[a-z]*"
_DATE = re.compile(
    r"\b(?:\d{4}-\d\d-\d\d|\d{1,2}[./]\d{1,2}[./]\d{2,4}"
    rf"|\d{{1,2}}(?:st|nd|rd|th)? {MONTH}(?:,? \d{{4}})?|{MONTH} \d{{1,2}}(?:st|nd|rd|th)?(?:,? \d{{4}})?)\b",
    re.IGNORECASE,
)
_YES_NO = re.compile(r"(yes|no)\b(?![-’'])", re.IGNORECASE)
_ASKS_NUMBER = re.compile(
    r"\bhow (?:many|much|long|far|old|often|tall|big|large|heavy|high|deep|wide|fast|late|soon)\b|"
    r"\b(?:price|cost|total|sum|number|percentage|rate|balance|fee|amount|age|weight|height)\b|what time",
    re.IGNORECASE,
)
# After these a number answers, too; after others it may name something, as in `Order 4521 has left`.
_BEFORE = re.compile(
    r"(?:^|[:=]\s*|\b(?:is|are|was|were|be|costs?|takes?|equals?|has|have|had|gets?|needs?|pays?|makes?|"
    r"totals?|of|to|in|for|at|by|about|exactly|only|within|until)\s+)(?:(?:a|the|about|exactly|only)\s+)?$",
    re.IGNORECASE,
)
_SENTENCE = re.compile(r"(?<=[.!?])\s+|\n+")
"""What stands between two sentences."""
_CONCLUDES = re.compile(
    r"^(?:so|thus|therefore|hence|altogether|in total|in all|(?:that|this) (?:is|makes|leaves))\b|"
    r"\b(?:answer|result|total|sum|remainder|difference|altogether|left|remain(?:s|ing)?)\b",
    re.IGNORECASE,
)
_NAMES_ANSWER = re.compile(r"\banswer(?:\s+is|\s*:)\s*(.+)$", re.IGNORECASE)
_NUMBER = re.compile(r"[-−]?(?:(?:USD|[$€£¥₹])\s?)?\d[\d,]*(?:\.\d+)?(?:\s?%|\s?[€£]|\s?/\s?\d+)?")


@dataclass(frozen=True)
class Unread:
    """Why no final answers were read: too few rows have one."""

    having: int
    of: int
    first: str
    """The text of the first row that has none."""


@dataclass(frozen=True)
class OwnRows:
    path: str
    """The file to go on with: the person's own, or the one that was written."""
    columns: dict[str, str] = field(default_factory=dict)
    """Field → column, where they have other names."""
    golds: list[tuple[str, str]] = field(default_factory=list)
    """The texts of rows from which a final answer was read, with it."""
    unread: Unread | None = None


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
    renamed = _columns(path, rows[0], columns)
    rows = [{renamed.get(name, name): value for name, value in row.items()} for row in rows]
    golds, unread = _golds(rows)
    if not renamed and not golds:
        return OwnRows(path, unread=unread)
    for number, (_, gold) in golds.items():
        rows[number]["gold"] = gold
    file = folder / f"{Path(path).name.split('.')[0]}-rows.jsonl"
    written += [] if file.exists() else [file]
    with whole_files([file], "write elsewhere: --out FOLDER/rows.yaml") as (new,):
        write_jsonl(new, rows)
    return OwnRows(
        str(file), {name: column for column, name in renamed.items()}, list(golds.values()), unread
    )


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
    try:
        formats.detect(path, {chosen.get(name, name): value for name, value in row.items()})
        return chosen
    except DataError as error:
        free = {name: column for name, column in by_name.items() if column not in chosen}
        columns = {name: column for column, name in chosen.items()}
        for name, usual in {**NAMES, "gold": ("gold",)}.items():
            if present := [free[other] for other in usual if other in free]:
                columns.setdefault(name, present[0])
        if "question" not in columns or not {"answer", "gold"} & set(columns):
            raise DataError(
                f"{path}: which column asks, and which answers? It has {', '.join(row)}",
                "--columns question=NAME,answer=NAME",
            ) from error
        return {column: name for name, column in columns.items()}


def _golds(rows: list[dict[str, Any]]) -> tuple[dict[int, tuple[str, str]], Unread | None]:
    """Row → its response and the final answer in it; none, and why, if fewer than SHARE of the rows have one.

    None are needed where each response is its answer: `read_rows` knows that by itself.
    """
    texts = {}
    for number, row in enumerate(rows):
        name = next((name for name in RESPONSES if row.get(name) is not None), None)
        question = next((str(row[name]) for name in QUESTIONS if row.get(name) is not None), None)
        if name and question is not None and row.get("gold") is None:
            texts[number] = question, str(row[name]).strip()
    responses = [response for _, response in texts.values()]
    if all(map(is_answer, responses)) or any(map(gold_from_response, responses)):
        return {}, None
    golds = {
        n: (text, gold) for n, (question, text) in texts.items() if (gold := final_answer(text, question))
    }
    if len(golds) >= SHARE * len(texts):
        return golds, None
    first = next(text for n, (_, text) in texts.items() if n not in golds)
    return {}, Unread(len(golds), len(texts), first)


def final_answer(text: str, question: str = "") -> str | None:
    """The final answer that a text is, or has, as a person would say it (RULE); None if it has none."""
    if "\n" not in (text := text.strip()) and (answer := _of_sentence(text, question)):
        return answer
    *before, last = _SENTENCE.split(text)
    if before and (named := _NAMES_ANSWER.search(last)):
        return _of_sentence(named[1], "")
    # What follows the last = is the result.
    numbers = _NUMBER.findall(last.rpartition("=")[2]) if before and _CONCLUDES.search(last) else []
    return numbers[0].strip() if len(numbers) == 1 and parse_number(numbers[0]) is not None else None


def _of_sentence(text: str, question: str) -> str | None:
    """The answer that a short text is, or has."""
    text = text.strip()
    if not text or len(text.split()) > WORDS:
        return None
    if letter := extract_letter(text, leading_only=True):
        return letter
    if is_answer(text):
        return text.rstrip(".")
    if verdict := _YES_NO.match(text):
        return verdict[1].lower()
    dates = _DATE.findall(text)
    undated = _DATE.sub("", text)
    numbers = list(_NUMBER.finditer(undated))
    if len(dates) == 1 and not numbers:
        return str(dates[0])
    if len(dates) == 0 and len(numbers) == 1 and parse_number(number := numbers[0][0].strip()) is not None:
        names_nothing = _BEFORE.search(undated[: numbers[0].start()]) or _ASKS_NUMBER.search(question)
        return number if names_nothing else None
    return text.rstrip(".!") if len(text.split()) <= FEW and not numbers and not dates else None
