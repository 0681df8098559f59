"""Grade base, init, sft and rl on the benchmarks.

A variant is TARGET@BENCHMARK, and a target in a mode is such as rl:fast.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING

from stages.config import TRAINED, UNTRAINED_TARGETS, BenchmarkSection, Config, split_target
from stages.evaluation.benchmarks import benchmarks
from stages.pipeline.stage import BENCHMARKS, INITIAL, Planned, Stage
from stages.plan.tokens import Lengths, Span, Work, per_text

if TYPE_CHECKING:
    from stages.plan.texts import Texts


def _steps(config: Config) -> list[Planned]:
    return [_step(config, target, name) for target in config.eval.targets for name in config.eval.benchmarks]


def _step(config: Config, target: str, name: str) -> Planned:
    evaluation, benchmark = config.eval, config.eval.benchmarks[name]
    shots = [f"shots:{name}"] if evaluation.as_asked(benchmark, target).shots else []
    served = evaluation.engine == "vllm"
    code = ["eval.sandbox"] if getattr(benchmarks.pick(benchmark.kind), "SANDBOX", False) else []
    of_untrained, weights = ("eval.untrained_items", "eval.untrained_shots"), split_target(target)[0]
    return Planned(
        variant=f"{target}@{name}",
        inputs=_inputs(benchmark, weights, name),
        sections=("model", "prompt", "modes", "eval", f"{BENCHMARKS}{name}", "server", *code),
        settings=of_untrained if weights in UNTRAINED_TARGETS else (),
        reads=("model", f"rows:{name}", *shots, *(["server"] if served else [])),
        asked_for=True,
        holds_base=not served,
        memory_hint="server.batch_size",
        answers_together=served and config.served_by_vllm,
    )


def _inputs(benchmark: BenchmarkSection, weights: str, name: str) -> tuple[str, ...]:
    labels = (f"classify:{name}",) if benchmark.label else ()
    if weights in TRAINED:
        return (*labels, weights)
    return (*labels, INITIAL) if weights == "init" else labels


def _spans(texts: Texts, variant: str) -> Iterator[Span]:
    from stages.plan.texts import generation_limit

    target, _, name = variant.partition("@")
    engine, benchmark = texts.config.eval.engine, texts.config.eval.benchmarks[name]
    if number := len(texts.rows[name]):
        lengths = Lengths(map(len, texts.prompts(name, target)))
        limit = texts.limit(engine, generation_limit(benchmark))
        fails = engine == "vllm" or benchmark.mode == "likelihood"
        beyond = "fail" if fails else "more than the model was made for"
        yield Span(f"prompt of {name}", number, lengths, *limit, beyond)


def _work(texts: Texts, variant: str) -> Work | None:
    """An answer to each item; the check of the first ones loads the model once more."""
    from stages.plan.texts import PROMPT_SAMPLE, generation_limit

    target, _, name = variant.partition("@")
    evaluation, rows = texts.config.eval, texts.rows[name]
    section = evaluation.benchmarks[name]
    is_untrained = split_target(target)[0] in UNTRAINED_TARGETS
    if is_untrained:
        rows = rows[: evaluation.untrained_items]
    if not rows:
        return None
    limit, slots = generation_limit(section), min(texts.config.server.batch_size, len(rows))
    prompts = texts.prompts(name, target)
    trained = texts.rows["train"] and not is_untrained
    response = texts.response_tokens(limit) if trained else float(limit)
    answers, served = len(rows) * section.samples, evaluation.engine == "vllm"
    checked = served and not section.temperature
    return Work(
        read=answers * per_text(prompts[:PROMPT_SAMPLE], slots),
        written=answers * response,
        slots=slots,
        length=max(map(len, prompts)) + limit,
        copies=1 + bool(checked),
        servers=served and name == next(iter(evaluation.benchmarks)),
    )


STAGE = Stage(
    name="eval",
    steps=_steps,
    files={
        "metrics.json": "For all items, each system and each group of the benchmark: counts, accuracy in "
        "both readings, intervals, tokens; also the first prompt and the stop texts.",
        "samples.jsonl": "One object per answer: `id`, `sample`, `system`, `prompt`, `output`, `gold`, "
        "`strict` and `flexible` (the answer in each reading), `correct`, `correct_flexible`, `outcome`.",
    },
    checks=lambda texts, step: [partial(texts.check_prompts, step)],
    spans=_spans,
    work=_work,
    version=10,
)
