"""GSM8K: whole numbers after `####` (Cobbe et al. 2021, arXiv 2110.14168); 0 or n shots, chat or plain."""

from typing import Any

from stages.config import BenchmarkSection
from stages.data import rows
from stages.errors import DataError
from stages.evaluation.grading import grade_final_answer, render_prompts, with_gold
from stages.prompts.answers import parse_number
from stages.records import Example

DEFAULTS: dict[str, Any] = {
    "path": "openai/gsm8k",
    "subset": "main",
    "split": "test",
    "revision": "e53f048856ff4f594e959d75785d2c2d37b678ee",
}
GROUPS = ()


def load(section: BenchmarkSection) -> list[Example]:
    examples = with_gold(rows.read(section))
    for example in examples:
        if parse_number(str(example.gold)) is None:
            message = f"GSM8K answers are numbers, got {example.gold!r} ({example.id})"
            raise DataError(message, "kind: jsonl compares words too")
    return examples


ask = render_prompts
grade = grade_final_answer
