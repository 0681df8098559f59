"""The demonstration set: numbers and single words, compared after extraction."""

from stages.benchmarks.grading import Grade, by_answer


def grade(gold: str, text: str, answer_format: str) -> Grade:
    return by_answer(gold, text, answer_format)
