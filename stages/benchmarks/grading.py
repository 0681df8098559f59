"""What grading one answer gives."""

from dataclasses import dataclass

from stages.language.answers import extract, same


@dataclass(frozen=True)
class Grade:
    strict: str | None
    """The answer in the format asked for; None is unparsed."""
    flexible: str | None
    """The strict answer, or the best guess where there is none."""
    correct: bool
    correct_flexible: bool


def by_answer(gold: str, text: str, answer_format: str) -> Grade:
    """Compare the extracted final answer with gold; the reward `correctness` reads answers the same way."""
    found = extract(text, answer_format)
    return Grade(found.strict, found.flexible, same(found.strict, gold), same(found.flexible, gold))
