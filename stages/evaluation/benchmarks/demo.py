"""The demonstration set: answers are numbers or single words, extracted and then compared."""

from typing import Any

from stages.config import BenchmarkSection
from stages.data import rows
from stages.evaluation.grading import grade_final_answer, render_prompts, with_gold
from stages.records import Example

DEFAULTS: dict[str, Any] = {"path": "data/demo/test.jsonl", "max_new_tokens": 48}
GROUPS = ("kind",)


def load(section: BenchmarkSection) -> list[Example]:
    return with_gold(rows.read(section))


ask = render_prompts
grade = grade_final_answer
