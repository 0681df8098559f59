"""Your own file: `prompt` and `answer`, and optionally `grade`: number, letter or text.

Of an answer that ends in `#### result`, the result counts. Without `grade`, an answer that is a number is
compared as a number, a single letter from A to J as a letter, and anything else as text, ignoring case and
punctuation at its ends.
"""

import functools
from typing import Any

from stages.config import SourceSection
from stages.data.formats import EmptyRowError, gold_field, text_field
from stages.data.rows import drop_duplicates, parse_rows, raw_rows, read
from stages.evaluation.grading import Context, Grade, grade_final_answer, render_prompts
from stages.prompts.answers import (
    equals_gold,
    extract,
    extract_letter,
    gold_from_response,
    gold_letter,
    parse_number,
    same_text,
)
from stages.records import Example
from stages.store.digests import id_of

DEFAULTS: dict[str, Any] = {}
GROUPS = ()


def load(section: SourceSection) -> list[Example]:
    return drop_duplicates(parse_rows(section, _example, "jsonl needs prompt, answer")[0], section)


def _example(row: dict[str, Any], _: int) -> Example:
    prompt, response = text_field(row, "prompt"), gold_field(row["answer"])
    answer = gold_from_response(response) or response
    if not prompt.strip() or not answer:
        raise EmptyRowError("prompt or answer is empty")
    guessed = "number" if parse_number(answer) is not None else "letter" if gold_letter(answer) else "text"
    kind = row.get("grade") or guessed
    if kind not in ("number", "letter", "text"):
        raise ValueError(f"field grade is {kind!r}, expected number, letter or text")
    no_number = kind == "number" and parse_number(answer) is None
    no_letter = kind == "letter" and not gold_letter(answer)
    if no_number or no_letter:
        raise ValueError(f"answer {answer!r} is not a {kind}")
    extra = {name: value for name, value in row.items() if name not in ("prompt", "answer", "grade")}
    gold = gold_letter(answer) if kind == "letter" else answer
    return Example(id_of([prompt, response]), prompt, response, gold, {**extra, "grade": kind})


def _shots(source: SourceSection) -> list[Example]:
    """Worked examples, in the form of this benchmark or in a form of training rows."""
    _, first_row = raw_rows(source.model_copy(update={"limit": 1}))[0]
    return load(source) if {"prompt", "answer"} <= first_row.keys() else read(source)


ask = functools.partial(render_prompts, read_shots=_shots)


def grade(example: Example, output: str, context: Context) -> Grade:
    if example.extra["grade"] != "letter":
        equal = same_text if example.extra["grade"] == "text" else equals_gold
        return grade_final_answer(example, output, context, equal)
    strict = extract_letter(extract(output, context.answer_format).strict or "")
    flexible = strict or extract_letter(output)
    return Grade(strict, flexible, strict == example.gold, flexible == example.gold)
