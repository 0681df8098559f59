"""Input and output of grading, and what benchmarks share: rendered prompts, grading by the final answer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from stages.data.rows import read, shots_source
from stages.errors import DataError
from stages.prompts.answers import extract, rewrite, same
from stages.prompts.renderer import Asked
from stages.records import Example

if TYPE_CHECKING:
    from stages.config import BenchmarkSection, SourceSection
    from stages.prompts.renderer import Renderer
    from stages.sandbox import Sandbox


@dataclass(frozen=True)
class Grade:
    strict: str | None
    """The answer, read in the requested format; None if the output does not have that format."""
    flexible: str | None
    """The strict answer, or a best guess where there is none."""
    correct: bool
    correct_flexible: bool
    refused: bool = False
    """Grading failed for a reason that says nothing about the answer."""
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Context:
    """What grading may need beside the item and the answer."""

    answer_format: str
    chat: bool
    sandbox: Sandbox | None = None


def by_answer(
    example: Example, output: str, context: Context, equal: Callable[[str | None, str], bool] = same
) -> Grade:
    """Compare the extracted final answer with gold; the reward `correctness` extracts it in the same way.

    What is right as it stands is right in the flexible reading, too.
    """
    assert example.gold is not None
    found = extract(output, context.answer_format)
    if equal(found.strict, example.gold):
        return Grade(found.strict, found.strict, True, True)
    return Grade(found.strict, found.flexible, False, equal(found.flexible, example.gold))


def with_gold(examples: list[Example]) -> list[Example]:
    """The same examples; DataError if one has no gold answer."""
    without = [e.id for e in examples if e.gold is None]
    if without:
        raise DataError(
            f"{len(without)} of {len(examples)} test rows have no gold answer (first: {without[0]})",
            "rows need `gold`, or a response that ends in `#### answer`",
        )
    return examples


def by_prompt(
    examples: list[Example],
    section: BenchmarkSection,
    renderer: Renderer,
    worked: Callable[[SourceSection], list[Example]] = read,
) -> list[Asked]:
    """The renderer's prompts, after `section.shots` worked examples in the answer format.

    worked: reads them from their source.
    """
    shots: list[tuple[str, str]] = []
    if section.shots:
        rows = worked(shots_source(section).model_copy(update={"limit": section.shots}))
        if len(rows) < section.shots:
            where = section.shots_path or section.path
            raise DataError(f"{where} has {len(rows)} rows for {section.shots} shots")
        if both := {row.prompt for row in rows} & {example.prompt for example in examples}:
            raise DataError(f"a worked example is asked, too: {min(both):.200}", "take others: shots_path")
        style = renderer.section.answer_format
        shots = [(row.prompt, rewrite(row.response, row.gold, style)) for row in rows]
    # In the plain template a model that has answered goes on and writes the next question.
    stop = ("\nQuestion:",) if renderer.section.template == "plain" else ()
    asked = []
    for example in examples:
        text = renderer.prompt(example.prompt, shots, of=example)
        asked.append(Asked(text, renderer.ids(text), stop))
    return asked
