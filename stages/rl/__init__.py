"""Train System 2's elements with GRPO, mainly on its rows."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

from stages.config import SECOND_SFT, Config
from stages.pipeline import external_key
from stages.pipeline.stage import TRAINED, Check, Stage, training_inputs
from stages.rewards import loading

if TYPE_CHECKING:
    from stages.pipeline.steps import Step
    from stages.plan.cost_model import CostModel
    from stages.plan.estimate import Cost
    from stages.plan.prompt_lengths import Texts
    from stages.store.digests import DigestCache

log = logging.getLogger(__name__)


def _inputs(config: Config, _: str) -> tuple[str, ...]:
    if config.rl.start_from == "init":
        return training_inputs(config, masks="rl", start="score")
    start = SECOND_SFT if config.sft.rounds == 2 else "sft"
    return training_inputs(config, masks="rl", start=start)


def _sections(config: Config, _: str) -> tuple[str, ...]:
    runs_code = loading.needs_sandbox(config.rl.rewards, config.rl.rewards_file)
    return ("model", "prompt", "lora", "baseline", "rl", "seed", *(["rl.sandbox"] if runs_code else []))


def _external_key(config: Config, _: str, cache: DigestCache) -> dict[str, Any]:
    # In the key only where steps are kept, so that other keys stay as they were.
    kept = {"keep_steps": sorted(config.rl.keep_steps)} if config.rl.keep_steps else {}
    return {**external_key.rewards_part(config, cache), **kept}


def _checks(texts: Texts, step: Step) -> Iterator[Check]:
    from stages.lora.grpo import vllm_rollouts
    from stages.plan import preflight

    rl = texts.config.rl
    yield from preflight.of_training(texts.config, rl.launch)
    yield from preflight.of_trainer(rl)
    yield partial(vllm_rollouts.check_machine, rl.rollouts)
    yield partial(_check_prompts, texts)


def _check_prompts(texts: Texts) -> None:
    """Raise the error that RL would raise about its rows; unlabelled ones are all taken as System 2."""
    from stages.lora.grpo import building
    from stages.lora.grpo.prompts import RlPrompts, row_fields
    from stages.plan.lengths import sampled
    from stages.plan.prompt_lengths import TRAINING_SAMPLE
    from stages.records import Labelled

    rl, labels = texts.config.rl, texts.labels
    functions = {name: loading.load(name, rl.rewards_file) for name in rl.rewards}
    renderer = texts.renderer("rl", labels)
    if not labels:
        # Only System 2 rows need the fields that rewards read, and which rows those are is not known yet.
        needed = {name: loading.required_fields(name, function) for name, function in functions.items()}
        rows = sampled(texts.rows["train"], TRAINING_SAMPLE)
        complete = [row for row in rows if not loading.missing_fields(needed, [row_fields(row, renderer)])]
        labels = [Labelled(row, 2, {}) for row in complete or rows]
        slow = rl.prompts_per_step - rl.replay_prompts
        if len(labels) < slow <= len(texts.rows["train"]):
            return  # a sample cannot tell
        rl = rl.model_copy(update={"system1_share": 0.0, "prompts_per_step": slow})
    prompts = RlPrompts.from_labels(labels, renderer, rl, functions, texts.config.seed)
    if texts.labels:
        building.optimizer_steps(prompts, rl)


def _cost(model: CostModel, _: str) -> Cost:
    from stages.lora.training.loop import steps_of
    from stages.plan import rl_steps
    from stages.plan.cost_model import SYSTEM1_SHARE, UNKNOWN

    rl, number = model.config.rl, len(model.texts.rows["train"])
    if model.config.baseline is not None:
        return UNKNOWN
    examples = number if rl.data == "all" else number * (1 - SYSTEM1_SHARE)
    new_prompts = rl.prompts_per_step - rl.replay_prompts
    steps = steps_of(int(examples // new_prompts), rl, rl.num_iterations)
    if not steps:
        hint = "lower rl.prompts_per_step"
        log.warning("rl: about %d rows do not fill the %d of a step: %s", examples, new_prompts, hint)
        return UNKNOWN
    return rl_steps.cost(model, rl, steps)


def _memory_hint(config: Config, _: str) -> str:
    from stages.plan import rl_steps

    return rl_steps.memory_hint(config)


STAGE = Stage(
    name="rl",
    inputs=_inputs,
    sections=_sections,
    external_key=_external_key,
    files={
        **TRAINED,
        "adapters/": "The adapter after each step of `rl.keep_steps`, under the step's number.",
    },
    checks=_checks,
    cost=_cost,
    holds_base=lambda config: not config.rl.launch.shards_base,
    memory_hint=_memory_hint,
    # vLLM's engine leaves process groups and GPU memory behind, which the next stage would need.
    needs_own_process=lambda config: config.rl.rollouts.engine == "vllm_colocate",
    version=9,
)
