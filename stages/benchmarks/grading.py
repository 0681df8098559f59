"""What grading gives and is given, and what benchmarks share: prompts of the renderer, grading by the final answer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from stages.errors import DataError
from stages.language.answers import extract, rewrite, same
from stages.language.prompts import Asked
from stages.records import Example, problems

if TYPE_CHECKING:
    from stages.config import BenchmarkSection
    from stages.language.prompts import Renderer
    from stages.sandbox import Sandbox


@dataclass(frozen=True)
class Grade:
    strict: str | None
    """The answer in the format asked for; None is unparsed."""
    flexible: str | None
    """The strict answer, or the best guess where there is none."""
    correct: bool
    correct_flexible: bool
    refused: bool = False
    """It could not be graded, through no fault of the answer."""
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Context:
    """What grading may need."""

    answer_format: str
    chat: bool
    sandbox: Sandbox | None = None


def by_answer(example: Example, output: str, context: Context) -> Grade:
    """Compare the extracted final answer with gold; the reward `correctness` reads answers the same way."""
    assert example.gold is not None
    found = extract(output, context.answer_format)
    return Grade(
        found.strict, found.flexible, same(found.strict, example.gold), same(found.flexible, example.gold)
    )


def with_gold(examples: list[Example]) -> list[Example]:
    """The same examples; DataError if one has no gold answer."""
    without = [e.id for e in examples if e.gold is None]
    if without:
        raise DataError(
            f"{len(without)} of {len(examples)} test rows have no gold answer (first: {without[0]})",
            "rows need `gold`, or a response that ends in `#### answer`",
        )
    return examples


def by_prompt(examples: list[Example], section: BenchmarkSection, renderer: Renderer) -> list[Asked]:
    """The renderer's prompts, after `section.shots` worked examples in the answer format."""
    shots: list[tuple[str, str]] = []
    if section.shots:
        from stages.data.rows import read, shots_source

        rows = read(shots_source(section).model_copy(update={"limit": section.shots}))
        if len(rows) < section.shots:
            raise DataError(
                f"{section.shots_path or section.path} has {len(rows)} rows for {section.shots} shots"
            )
        shots = [
            (row.prompt, rewrite(row.response, row.gold, renderer.section.answer_format)) for row in rows
        ]
    # A completion in this form goes on with a question of its own where the others end.
    stop = ("\nQuestion:",) if renderer.section.template == "plain" else ()
    return [
        Asked(renderer.prompt(e.prompt, shots), renderer.prompt_ids(e.prompt, shots), stop) for e in examples
    ]


def bad_rows(where: str, bad: list[str], needed: str) -> None:
    """DataError that lists every bad row, if there is one."""
    if bad:
        raise problems("bad row", bad, f"{where} needs {needed}")
