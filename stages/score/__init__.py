"""Create the initial adapter and score every LoRA element for each system.

Variants score its elements for the rows of `partition.protect` (`protected`) and, with `rl.rescore`, those of
SFT's adapter (`rl`).
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from statistics import fmean
from typing import TYPE_CHECKING, Any

from stages.config import Config, SourceSection
from stages.config.fields import cache_key_fields
from stages.config.rl import OF_UPDATES
from stages.lora.examples import PROTECTED
from stages.lora.importance.scorers import rescored_by_rollouts
from stages.lora.importance.strategies import strategies
from stages.pipeline import external_key
from stages.pipeline.stage import ADAPTER, WEIGHTS, Check, Stage
from stages.rewards import loading

if TYPE_CHECKING:
    from stages.pipeline.steps import Step
    from stages.plan.cost_model import CostModel
    from stages.plan.estimate import Cost
    from stages.plan.prompt_lengths import Texts
    from stages.store.digests import DigestCache


def _inputs(config: Config, scored: str) -> tuple[str, ...]:
    if scored == PROTECTED:
        return ("score",)
    if strategies.has_trait(config.partition.strategy, "unscored"):
        return ()
    if scored != "rl":
        return ("classify:train",)
    return ("classify:train", "sft", *(["score"] if rescored_by_rollouts(config) else []))


def _external_key(config: Config, scored: str, cache: DigestCache) -> dict[str, Any]:
    key = external_key.model_part(config, cache)
    key |= external_key.of_file("scorer_file", config.score.scorer_file, cache)
    if scored == PROTECTED:
        return {
            **key,
            "protected": external_key.of_source(SourceSection(path=config.partition.protect), cache),
        }
    if scored != "rl":
        return key
    if not rescored_by_rollouts(config):
        return {**key, "scorer": config.rl.rescore}
    rl = {name: value for name, value in cache_key_fields(config.rl).items() if name not in OF_UPDATES}
    if loading.needs_sandbox(config.rl.rewards, config.rl.rewards_file):
        rl["sandbox"] = cache_key_fields(config.rl.sandbox)
    return {**external_key.rewards_part(config, cache), "scorer": config.rl.rescore, "rl": rl}


def _variants(config: Config) -> tuple[str, ...]:
    if config.data.path is None or config.baseline is not None:
        return ()
    protected = (PROTECTED,) if config.partition.protect else ()
    return ("", *protected, *(("rl",) if config.rl.rescore else ()))


def _checks(texts: Texts, step: Step) -> Iterator[Check]:
    from stages.lora.adapter import adapter
    from stages.lora.training import loop
    from stages.plan import preflight
    from stages.score import gradients

    config = texts.config
    if step.variant == "":
        yield lambda: adapter.with_targets(texts.base, config.lora)
    if step.variant == PROTECTED:
        yield partial(_check_protected, texts)
    if step.variant == "rl" and rescored_by_rollouts(config):
        yield partial(loop.check_machine, config.rl, config.score.launch.is_distributed)
        yield partial(preflight.check_shares, gradients.without_updates(config.rl, config.score.launch))
    yield from preflight.of_training(config, config.score.launch)
    if "classify:train" in step.inputs:
        yield partial(_check_rows, texts)


def _check_rows(texts: Texts) -> None:
    """Raise the error about a row too long, or a system without any; unlabelled, all rows may be read."""
    from stages.lora import examples
    from stages.plan import preflight
    from stages.records import Labelled

    config = texts.config
    if not texts.labels:
        every_row = config.sft.model_copy(update={"data": "all"})
        slow = [Labelled(row, 2, {}) for row in texts.rows["train"]]
        preflight.check_lengths(texts, "score", examples.trained_by_sft(slow, every_row, config.seed))
        return
    for rows in examples.scored(texts.labels, config.score, config.seed).values():
        preflight.check_lengths(texts, "score", rows)


def _check_protected(texts: Texts) -> None:
    """Raise the error that scoring the protected rows would raise about their file, or a row too long."""
    from stages.lora import examples

    config = texts.config
    assert config.partition.protect is not None
    rows, _, _ = examples.protected(config.partition.protect, config.score, config.seed)
    texts.renderer("score", []).rows(rows, config.data)


def _cost(model: CostModel, scored: str) -> Cost:
    """Gradients of as many examples of either system, each by itself:

    seconds = min(2 · score.examples, rows) · row tokens · token_s

    Protected rows are one such set, and taken to be as long as the others. Where RL's elements are scored
    by its gradients, as many steps of RL as that takes.
    """
    from stages.plan import rl_steps
    from stages.plan.cost_model import NOTHING, UNKNOWN
    from stages.score import gradients

    score, protected, texts = model.config.score, scored == PROTECTED, model.texts
    if scored == "rl" and rescored_by_rollouts(model.config):
        rl = gradients.without_updates(model.config.rl, score.launch)
        return rl_steps.cost(model, rl, gradients.BATCHES)
    if strategies.has_trait(model.config.partition.strategy, "unscored") and not protected:
        return NOTHING
    if not texts.imitable:
        return UNKNOWN  # only protected rows are scored, whose lengths are not read here
    rows = texts.trained_rows("score")
    measured = model.profiler.measure_training(rows[: score.batch_size], True, 0.0, False, sharing=False)
    lengths = [len(row.input_ids) for row in rows]
    activations = measured.mib_of(sum(lengths[: score.batch_size]))
    memory = model.memory(activations, adapted=True, launched=score.launch)
    examples = score.examples if protected else min(2 * score.examples, texts.imitable)
    return model.total(examples * fmean(lengths) * measured.token_s, memory, score.launch)


def _memory_hint(config: Config, scored: str) -> str:
    from stages.plan import rl_steps

    if scored == "rl" and rescored_by_rollouts(config):
        return rl_steps.memory_hint(config)
    return "score.batch_size"


STAGE = Stage(
    name="score",
    inputs=_inputs,
    sections=lambda config, _: ("model", "data", "prompt", "lora", "score", "seed"),
    external_key=_external_key,
    variants=_variants,
    variants_help="score, protected or rl",
    unkeyed_sections=("rl", "partition.protect"),
    files={
        "init/": f"The adapter at the start. {ADAPTER}",
        "shapes.json": "Name of each LoRA weight → `[rows, columns]` of its part that is scored and trained.",
        "importance.safetensors": "`s1/NAME` and `s2/NAME`: float32 importance of each element, "
        f"{WEIGHTS}. "
        "Only where a strategy reads it. The variant `protected` has `protected/NAME`.",
        "held_out.jsonl": "Protected rows that were not scored, as in `labels.jsonl`. Only in the variant "
        "`protected`.",
    },
    checks=_checks,
    cost=_cost,
    holds_base=lambda config: not config.score.launch.shards_base,
    memory_hint=_memory_hint,
    version=2,
)
