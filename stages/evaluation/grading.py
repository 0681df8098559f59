"""Types of grading, and what benchmarks share: prompt rendering and grading by the final answer."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from stages.config import BenchmarkSection, SourceSection
from stages.data.rows import read, shots_source
from stages.errors import DataError
from stages.prompts.answers import extract, extract_letter, gold_letter, matches_gold, rewrite
from stages.prompts.renderer import RenderedPrompt, Renderer
from stages.records import Example
from stages.sandbox import Sandbox


@dataclass(frozen=True)
class Grade:
    """The verdict on one answer."""

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
    """Settings of an evaluation that grading depends on."""

    answer_format: str
    chat: bool
    sandbox: Sandbox | None = None


def grade_final_answer(
    example: Example, output: str, context: Context, equal: Callable[[str | None, str], bool] = matches_gold
) -> Grade:
    """Compare the extracted final answer with gold; the reward `correctness` extracts it in the same way.

    A strictly correct answer is also correct in the flexible reading.
    """
    assert example.gold is not None
    answer = extract(output, context.answer_format)
    if equal(answer.strict, example.gold):
        return Grade(answer.strict, answer.strict, True, True)
    flexible = answer.flexible
    if equal is matches_gold and gold_letter(example.gold):
        flexible = extract_letter(answer.strict or "") or extract_letter(output)
    return Grade(answer.strict, flexible, False, equal(flexible, example.gold))


def with_gold(examples: list[Example]) -> list[Example]:
    """The same examples; raises DataError if one has no gold answer."""
    without = [e.id for e in examples if e.gold is None]
    if without:
        raise DataError(
            f"{len(without)} of {len(examples)} test rows have no gold answer (first: {without[0]})",
            "rows need `gold`, or a response that ends in `#### answer`",
        )
    return examples


def render_prompts(
    examples: list[Example],
    section: BenchmarkSection,
    renderer: Renderer,
    read_shots: Callable[[SourceSection], list[Example]] = read,
) -> list[RenderedPrompt]:
    """Render a prompt for each example, after `section.shots` worked examples in the answer format.

    read_shots: reads the worked examples from their source.
    """
    shots: list[tuple[str, str]] = []
    if section.shots:
        rows = read_shots(shots_source(section).model_copy(update={"limit": section.shots}))
        if len(rows) < section.shots:
            where = section.shots_path or section.path
            raise DataError(f"{where} has {len(rows)} rows for {section.shots} shots")
        if leaked := {row.conversation for row in rows} & {example.conversation for example in examples}:
            message = f"a worked example is also a test item: {min(leaked):.200}"
            raise DataError(message, "choose other worked examples: shots_path")
        style = renderer.section.answer_format
        shots = [(row.conversation, rewrite(row.response, row.gold, style)) for row in rows]
    # In the plain template a model that has answered goes on and writes the next question.
    stop = ("\nQuestion:",) if renderer.section.template == "plain" else ()
    prompts = []
    for example in examples:
        text = renderer.prompt(example.prompt, shots, example=example)
        prompts.append(RenderedPrompt(text, renderer.ids(text), stop))
    return prompts
