"""Train System 1's elements, mainly on its rows."""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING

from stages.config import Config
from stages.pipeline.stage import TRAIN, TRAINED, Planned, Stage, training_inputs
from stages.plan.tokens import SYSTEM1_SHARE, Work, per_text
from stages.records import Labelled

if TYPE_CHECKING:
    from stages.plan.texts import Texts


def _steps(config: Config) -> list[Planned]:
    trained = config.eval.trained
    start = None if config.sft.start_from == "init" else "rl"
    return [
        Planned(
            inputs=training_inputs(config.baseline is not None, masks="sft", start=start),
            sections=("model", "data", "prompt", "modes", "lora", "baseline", "sft", "seed"),
            reads=("model",),
            asked_for=not config.eval.benchmarks and ("sft" in trained or "rl" not in trained),
            holds_base=True,
            memory_hint="sft.per_device_train_batch_size, or set sft.gradient_checkpointing",
        )
    ]


def _check_rows(texts: Texts) -> None:
    """Raise the error about a row too long, or a system without any; unlabelled, all rows may be read."""
    from stages.lora import examples

    config, labels, sft, modes = texts.config, texts.labels, texts.config.sft, texts.config.modes
    if not labels:
        # Their responses may be shortened as those of System 1 are, which under modes are answers alone.
        rows = map(examples.bare, texts.rows[TRAIN]) if modes else texts.rows[TRAIN]
        labels = [Labelled(row, 1, {}) for row in rows]
        sft, modes = sft.model_copy(update={"data": "all"}), None
    for mode, imitated in examples.trained_by_sft(labels, sft, modes, config.seed).items():
        texts.check_lengths(sft, imitated, mode)


def _work(texts: Texts, _: str) -> Work | None:
    """Forward and backward passes; without dropout a micro batch computes a common beginning once."""
    from stages.lora.training.loop import steps_of

    sft, number = texts.config.sft, texts.imitable
    if texts.config.baseline is not None or not number:
        return None  # SFT may still imitate answers alone, and no row is rendered with its answer
    examples = number if sft.data == "all" else number * SYSTEM1_SHARE * (1 + sft.system2_share)
    if modes := texts.config.modes:  # System 1 under fast, auto and slow, System 2 under auto and slow
        examples = number * (SYSTEM1_SHARE * (2 + modes.system1_under_slow) + 2 * (1 - SYSTEM1_SHARE))
    steps = steps_of(math.ceil(examples / sft.batch_size), sft)
    rows = [row.input_ids for row in texts.trained_rows(sft)]  # the longest first
    size = sft.per_device_train_batch_size
    sharing = 1 if sft.lora_dropout else size
    return Work(trained=steps * sft.batch_size * per_text(rows, sharing), batch=size * len(rows[0]))


STAGE = Stage(
    name="sft",
    steps=_steps,
    files=TRAINED,
    checks=lambda texts, _: [partial(_check_rows, texts)],
    spans=lambda texts, _: texts.imitated(),
    work=_work,
    version=7,
)
