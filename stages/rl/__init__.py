"""Train System 2's elements with GRPO, mainly on its rows."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING

from stages.config import Config
from stages.pipeline.stage import TRAIN, TRAINED, Planned, Stage, training_inputs
from stages.plan.tokens import SYSTEM1_SHARE, Span, Work, sampled
from stages.records import Labelled
from stages.rewards import calls
from stages.rewards.builtin import rewards

if TYPE_CHECKING:
    from stages.plan.texts import Texts


def _steps(config: Config) -> list[Planned]:
    rl = config.rl
    start = None if rl.start_from == "init" else "sft"
    has_vllm = rl.rollouts.engine == "vllm_colocate"
    code = ["rl.sandbox"] if calls.needs_sandbox(rl.rewards, rl.rewards_file) else []
    return [
        Planned(
            inputs=training_inputs(config.baseline is not None, masks="rl", start=start),
            sections=("model", "prompt", "modes", "lora", "baseline", "rl", "seed", *code),
            reads=("model", *(["file:rl.rewards_file"] if rl.rewards_file else [])),
            asked_for=not config.eval.benchmarks and "rl" in config.eval.trained,
            holds_base=True,
            memory_hint=("rl.rollouts.gpu_memory_utilization, or " if has_vllm else "")
            + "rl.per_device_train_batch_size, rl.rollouts.batch_size, or rl.max_completion_length, or set "
            "rl.gradient_checkpointing",
            # vLLM's engine leaves process groups and GPU memory behind, which the next stage would need.
            own_process=has_vllm,
        )
    ]


def _check_prompts(texts: Texts) -> None:
    """Raise the error that RL would raise about its rows; unlabelled ones are all taken as System 2."""
    from stages.lora.grpo import building
    from stages.lora.grpo.prompts import RlPrompts, row_fields
    from stages.plan.texts import TRAINING_SAMPLE
    from stages.prompts.renderer import renderers_of

    rl, labels = texts.config.rl, texts.labels
    functions = {name: rewards.pick(name, rl.rewards_file) for name in rl.rewards}
    renderers = renderers_of(texts.tokenizer, rl.prompt or texts.config.prompt, texts.config.modes)
    renderer = texts.renderer(rl)
    building.thought_limit(rl, renderer)
    if not labels:
        # Only System 2 rows need the fields that rewards read, and which rows those are is not known yet.
        needed = {name: calls.required_fields(function) for name, function in functions.items()}
        rows = sampled(texts.rows[TRAIN], TRAINING_SAMPLE)
        complete = [row for row in rows if not calls.missing_fields(needed, [row_fields(row, renderer)])]
        labels = [Labelled(row, 2, {}) for row in complete or rows]
        slow = rl.prompts_per_step - rl.replay_prompts
        if len(labels) < slow <= len(texts.rows[TRAIN]):
            return  # a sample cannot tell
        rl = rl.model_copy(update={"system1_share": 0.0, "prompts_per_step": slow})
    prompts = RlPrompts.from_labels(labels, renderers, rl, functions, texts.config.seed)
    if texts.labels:
        building.optimizer_steps(prompts, rl)


def _spans(texts: Texts, _: str) -> Iterator[Span]:
    rl, number = texts.config.rl, len(texts.rows[TRAIN])
    limit = ("rl.max_prompt_length", rl.max_prompt_length)
    yield Span("prompt of rl", number, texts.rl_prompts, *limit, rl.too_long)
    if texts.imitable:
        limit = ("rl.max_completion_length", rl.max_completion_length)
        yield Span("response", texts.imitable, texts.responses, *limit, "cut")


def _work(texts: Texts, _: str) -> Work | None:
    """C = prompts_per_step · num_generations completions a step, sampled and learned from once.

    Completions are packed behind one copy of their prompt. A forward pass without a backward pass, by the
    reference model or for the log-probabilities at sampling, is a third of both.
    """
    from stages.lora.training.loop import steps_of

    rl, number = texts.config.rl, len(texts.rows[TRAIN])
    if texts.config.baseline is not None:
        return None
    examples = number if rl.data == "all" else number * (1 - SYSTEM1_SHARE)
    examples *= 2 if texts.config.modes else 1  # under auto and slow
    steps = steps_of(int(examples // (rl.prompts_per_step - rl.replay_prompts)), rl)
    if not steps:
        return None
    completions = rl.prompts_per_step * rl.num_generations
    sampled_completions = steps * completions
    prompt = texts.rl_prompts.within(rl.max_prompt_length)
    response = texts.response_tokens(rl.max_completion_length)
    shared = rl.num_generations if rl.prefix_sharing == "auto" and not rl.lora_dropout else 1
    passes = 1 + bool(rl.beta) / 3
    longest = min(texts.rl_prompts.longest, rl.max_prompt_length)
    return Work(
        trained=sampled_completions * (prompt / shared + response) * passes,
        read=sampled_completions * prompt / rl.num_generations,
        written=sampled_completions * response,
        batch=rl.per_device_train_batch_size * (longest / shared + rl.max_completion_length),
        slots=min(completions, rl.rollouts.batch_size),
        length=longest + rl.max_completion_length,
        copies=2,
    )


STAGE = Stage(
    name="rl",
    steps=_steps,
    files=TRAINED,
    checks=lambda texts, _: [partial(_check_prompts, texts)],
    spans=_spans,
    work=_work,
    version=9,
)
