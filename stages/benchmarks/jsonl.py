"""Your own file: `prompt` and `answer`, and optionally `grade`: number, letter or text.

Without `grade`, an answer that is a number is compared as a number, a single letter from A to J as a letter,
and anything else as text, ignoring case and punctuation at its ends.
"""

import functools
import hashlib
import logging
import re
from typing import Any

from stages.benchmarks.grading import Context, Grade, bad_rows, by_answer, by_prompt
from stages.config import SourceSection
from stages.data.rows import gold_field, once, read, table, text_field
from stages.language.answers import extract, letter, number, same, same_text
from stages.records import Example
from stages.store.digests import canonical

DEFAULTS: dict[str, Any] = {}
GROUPS = ()


log = logging.getLogger(__name__)


def load(section: SourceSection) -> list[Example]:
    where, rows = table(section)
    found, bad, empty = [], [], 0
    for at, row in rows:
        try:
            prompt, answer = text_field(row, "prompt"), gold_field(row["answer"])
            if not prompt.strip() or not answer:
                empty += 1
                if section.empty == "drop":
                    continue
                raise ValueError("prompt or answer is empty")
            kind = row.get("grade") or _kind(answer)
            if kind not in ("number", "letter", "text"):
                raise ValueError(f"field grade is {kind!r}, expected number, letter or text")
            no_number = kind == "number" and number(answer) is None
            no_letter = kind == "letter" and not _LETTER.fullmatch(answer)
            if no_number or no_letter:
                raise ValueError(f"answer {answer!r} is no {kind}")
        except (KeyError, ValueError) as error:
            missing = "field answer is missing" if isinstance(error, KeyError) else str(error)
            bad.append(f"{where}:{at}: {missing}")
            continue
        extra = {k: v for k, v in row.items() if k not in ("prompt", "answer", "grade")}
        digest = hashlib.sha256(canonical([prompt, answer])).hexdigest()[:16]
        example = Example(digest, prompt, answer, answer, {**extra, "grade": kind})
        found.append((f"{where}:{at}", example))
    bad_rows("jsonl", bad, "prompt, answer" + ("; empty: drop leaves out empty ones" if empty else ""))
    if empty:
        log.info("%s: %d rows without prompt or answer left out", where, empty)
    return once(found, section)


_LETTER = re.compile("[A-J]")


def _kind(answer: str) -> str:
    if number(answer) is not None:
        return "number"
    return "letter" if _LETTER.fullmatch(answer) else "text"


def _shots(source: SourceSection) -> list[Example]:
    """Worked examples: in the benchmark's own form, or in one of training rows."""
    own = {"prompt", "answer"} <= table(source.model_copy(update={"limit": 1}))[1][0][1].keys()
    return load(source) if own else read(source)


ask = functools.partial(by_prompt, worked=_shots)


def grade(example: Example, output: str, context: Context) -> Grade:
    if example.extra["grade"] != "letter":
        equal = same_text if example.extra["grade"] == "text" else same
        return by_answer(example, output, context, equal)
    strict = letter(extract(output, context.answer_format).strict or "")
    flexible = strict or letter(output)
    return Grade(strict, flexible, strict == example.gold, flexible == example.gold)
