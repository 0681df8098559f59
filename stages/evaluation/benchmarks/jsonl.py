"""Your own file: `prompt` or `question`, and `answer`, and optionally `grade`: number, letter or text.

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
from stages.prompts import answers
from stages.records import Example
from stages.store.digests import id_of

DEFAULTS: dict[str, Any] = {}
GROUPS = ()
FIELDS = {"prompt", "question", "answer", "grade"}
"""Of a row; what else it has is at hand for graders."""


def load(section: SourceSection) -> list[Example]:
    return drop_duplicates(parse_rows(section, _example, "jsonl needs prompt, answer")[0], section)


def _example(row: dict[str, Any], _: int) -> Example:
    if "question" in row:  # as training rows call it
        row = {"prompt": row["question"], **row}
    prompt, response = text_field(row, "prompt"), gold_field(row["answer"])
    answer = answers.gold_from_response(response) or response
    if not prompt.strip() or not answer:
        raise EmptyRowError("prompt or answer is empty")
    is_number, letter = answers.parse_number(answer) is not None, answers.gold_letter(answer)
    guessed = "number" if is_number else "letter" if letter else "text"
    kind = row.get("grade") or guessed
    if kind not in ("number", "letter", "text"):
        raise ValueError(f"field grade is {kind!r}, expected number, letter or text")
    if (kind == "number" and not is_number) or (kind == "letter" and not letter):
        raise ValueError(f"answer {answer!r} is not a {kind}")
    extra = {name: value for name, value in row.items() if name not in FIELDS}
    gold = letter if kind == "letter" else answer
    return Example(id_of([prompt, response]), prompt, response, gold, {**extra, "grade": kind})


def _shots(source: SourceSection) -> list[Example]:
    """Worked examples, in the form of this benchmark or in a form of training rows."""
    _, first_row = raw_rows(source.model_copy(update={"limit": 1}))[0]
    return load(source) if {"prompt", "answer"} <= first_row.keys() else read(source)


ask = functools.partial(render_prompts, read_shots=_shots)


def grade(example: Example, output: str, context: Context) -> Grade:
    if example.extra["grade"] != "letter":
        equal = answers.same_text if example.extra["grade"] == "text" else answers.equals_gold
        return grade_final_answer(example, output, context, equal)
    final_answer = answers.extract(output, context.answer_format).strict
    strict = answers.extract_letter(final_answer or "")
    flexible = strict or answers.extract_letter(output)
    return Grade(strict, flexible, strict == example.gold, flexible == example.gold)
