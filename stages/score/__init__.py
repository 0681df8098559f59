"""Create the initial adapter and score every LoRA element for each system.

The variant `protected` scores its elements for the rows of `partition.protect`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from statistics import fmean
from typing import TYPE_CHECKING

from stages.config import Config
from stages.lora.examples import PROTECTED
from stages.lora.importance.strategies import strategies
from stages.pipeline.stage import ADAPTER, TRAIN, Check, Planned, Stage
from stages.plan.tokens import Work
from stages.records import Labelled

if TYPE_CHECKING:
    from stages.pipeline.steps import Step
    from stages.plan.texts import Texts


def _steps(config: Config) -> list[Planned]:
    if config.data.path is None or config.baseline is not None:
        return []
    unscored = strategies.has_trait(config.partition.strategy, "unscored")
    step = Planned(
        inputs=() if unscored else ("classify:train",),
        sections=("model", "data", "prompt", "modes", "lora", "score", "seed"),
        reads=("model", *(["file:score.scorer_file"] if config.score.scorer_file else [])),
        holds_base=True,
        memory_hint="score.batch_size",
    )
    if not config.partition.protect:
        return [step]
    reads = (*step.reads, "rows:partition.protect")
    return [step, replace(step, variant=PROTECTED, inputs=("score",), reads=reads)]


def _checks(texts: Texts, step: Step) -> Iterator[Check]:
    from stages.lora.adapter import adapter

    yield lambda: adapter.with_targets(texts.base, texts.config.lora)
    if "classify:train" in step.inputs:
        yield partial(_check_rows, texts)
    if step.variant == PROTECTED:
        yield partial(_check_protected, texts)


def _check_rows(texts: Texts) -> None:
    """Raise the error about a row too long, or a system without any; unlabelled, all rows may be read."""
    from stages.lora import examples

    config = texts.config
    if texts.labels:
        by_group, _ = examples.scored(texts.labels, config.score, config.seed)
    else:
        every_row = config.sft.model_copy(update={"data": "all"})
        slow = [Labelled(row, 2, {}) for row in texts.rows[TRAIN]]
        by_group = examples.trained_by_sft(slow, every_row, None, config.seed)
    for rows in by_group.values():
        texts.check_lengths(config.score, rows)


def _check_protected(texts: Texts) -> None:
    """Raise the error that scoring the protected rows would raise about their file, or a row too long."""
    from stages.lora import examples

    config = texts.config
    rows, _ = examples.protected(str(config.partition.protect), config.score, config.seed)
    texts.renderer(config.score).rows(rows[PROTECTED], config.data)


def _work(texts: Texts, scored: str) -> Work | None:
    """Gradients of as many examples of either system, each by itself; protected rows may be as long."""
    score = texts.config.score
    if strategies.has_trait(texts.config.partition.strategy, "unscored") and scored != PROTECTED:
        return Work()
    if not texts.imitable:
        return None
    lengths = [len(row.input_ids) for row in texts.trained_rows(score)]  # the longest first
    examples = score.examples if scored == PROTECTED else min(2 * score.examples, texts.imitable)
    return Work(trained=examples * fmean(lengths), batch=sum(lengths[: score.batch_size]))


STAGE = Stage(
    name="score",
    steps=_steps,
    variants_help="score or protected",
    unkeyed_sections=("partition.protect",),
    files={
        "init/": f"The initial adapter. {ADAPTER}",
        "shapes.json": "NAME → `[rows, columns]` of its part that is scored and trained.",
        "importance.safetensors": "`s1/NAME` and `s2/NAME`: float32 importance of each element. "
        "Only where a strategy reads it. The variant `protected` has `protected/NAME` alone.",
    },
    checks=_checks,
    spans=lambda texts, _: texts.imitated(),
    work=_work,
    version=2,
)
