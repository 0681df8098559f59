"""Grades the answers of an evaluation: each becomes a sample."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from stages.evaluation.benchmarks import benchmarks
from stages.records import Labelled, Sample
from stages.runtime import resources

if TYPE_CHECKING:
    from stages.config import BenchmarkSection
    from stages.eval.answer_cache import CachedAnswer
    from stages.evaluation.grading import Context, Grade
    from stages.progress import Progress
    from stages.prompts.renderer import RenderedPrompt, Renderer


def grade_all(
    rows: list[Labelled],
    prompts: list[RenderedPrompt],
    answers: dict[tuple[int, int], CachedAnswer],
    renderer: Renderer,
    context: Context,
    benchmark: BenchmarkSection,
    progress: Progress,
) -> list[Sample]:
    """Grade every answer, in the order of rows and samples. Programs run side by side on all cores."""
    grade = benchmarks.pick(benchmark.kind).grade
    slots = [(i, n) for i in range(len(rows)) for n in range(benchmark.samples)]
    if context.sandbox:
        progress.start("running programs", len(slots))

    def grade_answer(slot: tuple[int, int]) -> Sample:
        i, n = slot
        example = rows[i].example
        answer = answers[slot].text(renderer.tokenizer, prompts[i])
        verdict: Grade = grade(example, answer.text, context)
        if context.sandbox:
            progress.advance(1)
        # A row's own `tokens` would count as the length of its answer.
        fields = {name: value for name, value in example.extra.items() if name != "tokens"}
        return Sample(
            id=example.id,
            sample=n,
            system=rows[i].system,
            prompt=prompts[i].text,
            output=answer.text,
            gold=example.gold,
            strict=verdict.strict,
            flexible=verdict.flexible,
            correct=verdict.correct,
            correct_flexible=verdict.correct_flexible,
            outcome=_outcome(verdict, answer.complete),
            extra={**fields, **verdict.extra, **answer.extra},
        )

    with ThreadPoolExecutor(resources.usable_cores() if context.sandbox else 1) as pool:
        return list(pool.map(grade_answer, slots))


def _outcome(grade: Grade, complete: bool) -> str:
    """One of `records.OUTCOMES`; complete: the answer did not end at the length limit."""
    if grade.refused:
        return "refused"
    if grade.correct:
        return "correct"
    if not complete:
        return "truncated"
    return "unparsed" if grade.strict is None else "wrong"
