"""Predicts steps of RL, and of scoring by RL's gradients, see `cost_model.py`."""

from __future__ import annotations

import logging
from dataclasses import replace
from itertools import cycle, islice

from stages.config import Config, RlSection
from stages.errors import ConfigError
from stages.lora.grpo import int8, vllm_rollouts
from stages.pipeline import launch
from stages.plan.cost_model import CostModel
from stages.plan.estimate import Cost, MemoryEstimate
from stages.plan.profiler import Measurement
from stages.plan.prompt_lengths import prompt_length
from stages.prompts.renderer import IGNORED, Row

log = logging.getLogger(__name__)

COLOCATED = "rl.rollouts.gpu_memory_utilization, or set rl.rollouts.enable_sleep_mode, or lower "


def memory_hint(config: Config) -> str:
    """The settings that lower the memory of these steps."""
    return (COLOCATED if config.rl.rollouts.engine == "vllm_colocate" else "") + (
        "rl.per_device_train_batch_size, rl.rollouts.batch_size, or rl.max_completion_length, "
        "or set rl.gradient_checkpointing"
    )


def cost(model: CostModel, rl: RlSection, steps: int) -> Cost:
    """Steps that learn from C = prompts_per_step · num_generations completions, sampled every μ steps:

    seconds = steps · (learning_s + generation_s / μ)
    learning_s = C · (P / shared + R) · passes · token_s

    P, R: mean tokens of a prompt and of a completion. shared: completions that are packed behind one
    copy of their prompt. passes: 1, and ⅓ more for each forward pass without a backward pass: by the
    reference model for the KL term, and by the policy for the log-probabilities at sampling. μ:
    num_iterations. generation_s: see `CostModel.generation_s`; sampling packs whatever the dropout in
    training.
    """
    profiler = model.profiler
    rows = model.texts.training_rows("rl")
    packed = rl.prefix_sharing == "auto" and not rl.lora_dropout  # as `trl.may_share` says
    batch = _longest_batch(rows, rl)
    measured = profiler.measure_training(batch, packed, rl.lora_dropout, rl.gradient_checkpointing)
    supported = profiler.supports_packing(rows[0].input_ids)

    completions = rl.prompts_per_step * rl.num_generations
    prompt = model.texts.rl_prompts.within(rl.max_prompt_length)
    response = model.response_tokens(rl.max_completion_length)
    shared = rl.num_generations if supported and packed else 1
    corrected = rl.rollouts.engine != "transformers" and rl.rollouts.correction != "none"
    passes = 1 + (bool(rl.beta) + (rl.num_iterations > 1 or corrected)) / 3
    learning_s = completions * (prompt / shared + response) * passes * measured.token_s
    read_tokens = prompt / rl.num_generations if supported else prompt
    generation_s = model.generation_s(completions, read_tokens, response, _in_int8(model, rl))
    thread_s = steps * (learning_s + generation_s / rl.num_iterations)
    return model.total(thread_s, _memory(model, rl, measured, shared), rl.launch)


def _longest_batch(rows: list[Row], rl: RlSection) -> list[Row]:
    """A micro batch at its limits: completions of full length, each group behind one of the longest prompts.

    References, repeated or cut, stand in for completions. The first token of each differs, so that only the
    prompt is shared.
    """
    longest = sorted(rows, key=prompt_length, reverse=True)[: rl.per_device_train_batch_size]
    batch = []
    for at, row in enumerate(longest):
        first = longest[at - at % rl.num_generations]
        prompt = first.input_ids[: prompt_length(first)][-rl.max_prompt_length :]
        reference = row.input_ids[prompt_length(row) :] or prompt
        completion = [at, *islice(cycle(reference), rl.max_completion_length - 1)]
        batch.append(Row(row.id, prompt + completion, [IGNORED] * len(prompt) + completion))
    return batch


def _in_int8(model: CostModel, rl: RlSection) -> bool:
    """Whether rollouts are sampled in 8 bits: only a merged copy is, as `building.py` has it."""
    mergeable = not model.config.model.load_in_4bit and model.config.baseline is None
    return rl.rollouts.int8 and mergeable and int8.is_supported(model.profiler.base)


def _memory(model: CostModel, rl: RlSection, measured: Measurement, shared: int) -> MemoryEstimate:
    """The larger of two phases, training passes and sampling. measured, shared: see `cost`."""
    profiler = model.profiler
    prompt = min(model.texts.rl_prompts.longest, rl.max_prompt_length)
    batch_tokens = rl.per_device_train_batch_size * (prompt / shared + rl.max_completion_length)
    activations = measured.mib_of(batch_tokens)
    if rl.rollouts.engine == "vllm_colocate":
        return _memory_with_vllm(model, rl, activations)
    if rl.rollouts.engine == "vllm_server":
        return model.memory(activations, trained=True, launched=rl.launch)
    # A merged copy samples, and stays in training; of a base in 4 bits or in parts there is none.
    merged = launch.gpu_split(rl.launch)[1] == 1 and not model.config.model.load_in_4bit
    in_int8 = _in_int8(model, rl)
    # In 8 bits its weights stand beside those in 32.
    copy = profiler.copy_mib * (1.25 if in_int8 else 1.0) if merged else 0.0
    training = model.memory(activations, trained=True, launched=rl.launch, copy=copy)
    slots = min(rl.prompts_per_step * rl.num_generations, rl.rollouts.batch_size)
    cache = profiler.kv_cache_mib(slots, prompt + rl.max_completion_length)
    decoding = model.generation(in_int8)[1].mib_of(slots)  # by whole layers, even where training divides them
    sampling = model.memory(decoding, trained=True, copy=copy, cache=cache)
    return max(training, sampling, key=lambda phase: phase.total)


def _memory_with_vllm(model: CostModel, rl: RlSection, activations: float) -> MemoryEstimate:
    """With vLLM on the same GPU, which may sleep while training passes are computed."""
    profiler = model.profiler
    alone = model.memory(0.0, trained=True, launched=rl.launch)
    training = replace(alone, activations=activations)
    share = rl.rollouts.gpu_memory_utilization
    if share is None and not profiler.on_gpu:
        share = vllm_rollouts.CPU_SHARE
    try:
        cache = share * profiler.room if share else profiler.colocated_mib(
            rl, profiler.room - alone.total, launch.gpu_split(rl.launch)[0]
        )  # fmt: skip
    except ConfigError as error:
        log.warning("%s; choose %s", error, error.hint)
        cache = profiler.room + 1.0
    if rl.rollouts.enable_sleep_mode:
        return max(training, replace(alone, cache=cache), key=lambda phase: phase.total)
    return replace(training, cache=cache)
