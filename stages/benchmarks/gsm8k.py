"""GSM8K: whole numbers after `####`, thousands commas allowed (Cobbe et al. 2021, arXiv 2110.14168)."""

from stages.benchmarks.grading import Grade, by_answer
from stages.errors import DataError
from stages.language.answers import number


def grade(gold: str, text: str, answer_format: str) -> Grade:
    if number(gold) is None:
        raise DataError(f"GSM8K answers are numbers, got {gold!r}", "--set eval.benchmark=demo compares words too")
    return by_answer(gold, text, answer_format)
