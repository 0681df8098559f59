"""Predicts time and memory of each step: its number of tokens, times what a token costs in a measured batch.

Before a run nobody knows how the rows will be labelled or how long answers get. The model assumes that half
of the rows are System 1; that a trained model's answers are as long as the references, and an untrained one's
run to the limit; that vLLM generates no faster than this process would; and that n GPUs take 1/n of one's
time. The start of processes, a few seconds each, is left out.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from statistics import fmean
from typing import Any

from stages.config import ROUTED, UNTRAINED_TARGETS, UNVOTED, Config, LaunchSection, RlSection
from stages.engines.continuous_batching import FREE_SHARE
from stages.engines.in_process import batch_sizes
from stages.errors import ConfigError, is_out_of_memory
from stages.labelling.personas import held_out
from stages.lora.examples import PROTECTED
from stages.lora.grpo import gradients, vllm_rollouts
from stages.lora.importance.strategies import strategies
from stages.lora.training.loop import steps_of
from stages.pipeline import launch
from stages.pipeline.stages import rescored_by_rollouts
from stages.pipeline.steps import Step
from stages.plan.estimate import Cost, MemoryEstimate
from stages.plan.profiler import Measurement, Profiler, per_text
from stages.plan.prompt_lengths import PROMPT_SAMPLE, Texts, generation_limit
from stages.runtime.resources import MIB

log = logging.getLogger(__name__)

SERVER_S = 40.0
"""Seconds to start a vLLM server: 37 to 51 for 135 million parameters on two cores, more for more."""
SYSTEM1_SHARE = 0.5
"""Share of System 1 among the rows."""
ADAM_BYTES = 16
"""Bytes of a trained element of the adapter: gradient, Adam's two moments, index among the packed ones."""
NOTHING, UNKNOWN = Cost(0.0), Cost()


class CostModel:
    """Predicts the steps of a run from the texts that they read and a profile of the model."""

    def __init__(self, config: Config, texts: Texts, profiler: Profiler) -> None:
        self.config, self.texts, self.profiler = config, texts, profiler

    def cost(self, step: Step) -> Cost:
        by_stage: dict[str, Callable[[str], Cost]] = {
            "classify": self._classify,
            "score": self._score,
            "partition": lambda _: NOTHING,
            "sft": self._sft,
            "rl": self._rl,
            "eval": self._eval,
        }
        try:
            return by_stage.get(step.stage.name, lambda _: UNKNOWN)(step.variant)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            # Not even the small batch that is measured fits.
            return Cost(memory=MemoryEstimate(activations=self.profiler.room + 1))

    def _classify(self, variant: str) -> Cost:
        """Votes, one forward pass over each prompt:

        seconds = (rows + held-out examples) · Σ_voters samples · prompt tokens · token_s
        """
        config, rows, voters = self.config, self.texts.rows[variant], self.config.classify.voters
        if config.labelling_strategy(variant) in UNVOTED or not rows:
            return NOTHING
        if config.model.load_in_4bit or any(v.model or v.urls or v.thinking for v in voters):
            return UNKNOWN  # other models vote (the base itself in 16 bits), or think at unknown length
        ballots = self.texts.ballots(variant)
        row_tokens = largest_batch = 0.0
        prompts: Any  # token ids
        for voter, requests in zip(voters, ballots, strict=True):
            prompts = sorted(request.text for request in requests[:PROMPT_SAMPLE])
            size = max(batch_sizes(prompts))
            row_tokens += voter.samples * per_text(prompts, size)
            largest_batch = max(largest_batch, size * per_text(prompts, size))
        measured = self.profiler.measure_votes(ballots[0])
        served = [voter for voter in voters if voter.engine != "transformers"]
        memory = None if served else self._memory(measured.mib_of(largest_batch))
        # All steps share the server, and the votes on held-out examples, which a journal keeps.
        first = variant == "train"
        examples = len(rows) + (len(held_out(config.classify.held_out)) if first else 0)
        thread_s = examples * row_tokens * measured.token_s
        return self._cost(thread_s, memory, starts=SERVER_S if served and first else 0.0)

    def _score(self, scored: str) -> Cost:
        """Gradients of as many examples of either system, each by itself:

        seconds = min(2 · score.examples, rows) · row tokens · token_s

        Protected rows are one such set, and taken to be as long as the others. Where RL's elements are scored
        by its gradients, as many steps of RL as that takes.
        """
        score, protected = self.config.score, scored == PROTECTED
        if scored == "rl" and rescored_by_rollouts(self.config):
            return self._rl_steps(gradients.without_updates(self.config.rl, score.launch), gradients.BATCHES)
        if strategies.has_trait(self.config.partition.strategy, "unscored") and not protected:
            return NOTHING
        if not self.texts.imitable:
            return UNKNOWN  # only protected rows are scored, whose lengths are not read here
        rows = self.texts.trained_rows("score")
        measured = self.profiler.measure_training(rows[: score.batch_size], True, 0.0, False)
        lengths = [len(row.input_ids) for row in rows]
        activations = measured.mib_of(sum(lengths[: score.batch_size]))
        memory = self._memory(activations, adapted=True, launched=score.launch)
        examples = score.examples if protected else min(2 * score.examples, self.texts.imitable)
        return self._cost(examples * fmean(lengths) * measured.token_s, memory, score.launch)

    def _sft(self, variant: str) -> Cost:
        """Forward and backward passes, in micro batches that without dropout compute a common beginning once:

        seconds = steps · batch_size · row tokens · token_s
        """
        sft, number = self.config.sft, self.texts.imitable
        if self.config.baseline is not None or not number:
            return UNKNOWN  # SFT may still imitate answers alone, and no row is rendered with its answer
        # First round: System 1's rows, and system2_share times as many of System 2 as the cold start. Second
        # round: System 2's rows.
        by_round = SYSTEM1_SHARE * (1 + sft.system2_share) if not variant else 1 - SYSTEM1_SHARE
        examples = number if sft.data == "all" else number * by_round
        steps = steps_of(math.ceil(examples / sft.batch_size), sft)
        rows, packed = self.texts.trained_rows("sft"), sft.padding_free == "auto"
        batch = rows[: sft.per_device_train_batch_size]
        measured = self.profiler.measure_training(batch, packed, sft.lora_dropout, sft.gradient_checkpointing)
        sharing = sft.per_device_train_batch_size if packed and not sft.lora_dropout else 1
        batch_tokens = len(batch) * per_text([row.input_ids for row in batch], sharing)
        memory = self._memory(measured.mib_of(batch_tokens), trained=True, launched=sft.launch)
        row_tokens = per_text([row.input_ids for row in rows], sharing)
        return self._cost(steps * sft.batch_size * row_tokens * measured.token_s, memory, sft.launch)

    def _rl(self, _: str) -> Cost:
        """Steps that learn from C = prompts_per_step · num_generations completions, sampled every μ steps:

        seconds = steps · (learning_s + generation_s / μ)
        learning_s = C · (P / shared + R) · passes · token_s

        P, R: mean tokens of a prompt and of a completion. shared: completions that are packed behind one
        copy of their prompt. passes: 1, and ⅓ more for each forward pass without a backward pass: by the
        reference model for the KL term, and by the policy for the log-probabilities at sampling. μ:
        num_iterations. generation_s: see `_generation_s`; sampling packs whatever the dropout in training.
        """
        rl, number = self.config.rl, len(self.texts.rows["train"])
        if self.config.baseline is not None:
            return UNKNOWN
        examples = number if rl.data == "all" else number * (1 - SYSTEM1_SHARE)
        new_prompts = rl.prompts_per_step - rl.replay_prompts
        steps = steps_of(int(examples // new_prompts), rl, rl.num_iterations)
        if not steps:
            hint = "lower rl.prompts_per_step"
            log.warning("rl: about %d rows do not fill the %d of a step: %s", examples, new_prompts, hint)
            return UNKNOWN
        return self._rl_steps(rl, steps)

    def _rl_steps(self, rl: RlSection, steps: int) -> Cost:
        """The cost of so many steps with these settings, see `_rl`."""
        profiler = self.profiler
        rows = self.texts.trained_rows("rl")
        packed = rl.prefix_sharing == "auto" and not rl.lora_dropout  # as `trainer_inputs.may_share` says
        batch = rows[: rl.per_device_train_batch_size]
        measured = profiler.measure_training(batch, packed, rl.lora_dropout, rl.gradient_checkpointing)
        supported = profiler.supports_packing(rows[0].input_ids)

        completions = rl.prompts_per_step * rl.num_generations
        prompt = self.texts.rl_prompts.within(rl.max_prompt_length)
        response = self._response_tokens(rl.max_completion_length)
        shared = rl.num_generations if supported and packed else 1
        corrected = rl.rollouts.engine != "transformers" and rl.rollouts.correction != "none"
        passes = 1 + (bool(rl.beta) + (rl.num_iterations > 1 or corrected)) / 3
        learning_s = completions * (prompt / shared + response) * passes * measured.token_s
        read_tokens = prompt / rl.num_generations if supported else prompt
        generation_s = self._generation_s(completions, read_tokens, response)
        thread_s = steps * (learning_s + generation_s / rl.num_iterations)
        return self._cost(thread_s, self._rl_memory(rl, measured, shared), rl.launch)

    def _response_tokens(self, limit: int) -> float:
        """Mean length of a trained model's answers: as the responses or, if no row has one, the limit."""
        return self.texts.responses.within(limit) if self.texts.imitable else float(limit)

    def _rl_memory(self, rl: RlSection, measured: Measurement, shared: int) -> MemoryEstimate:
        """The larger of two phases, training passes and sampling. measured, shared: see `_rl`."""
        profiler = self.profiler
        prompt = min(self.texts.rl_prompts.longest, rl.max_prompt_length)
        batch_tokens = rl.per_device_train_batch_size * (prompt / shared + rl.max_completion_length)
        activations = measured.mib_of(batch_tokens)
        if rl.rollouts.engine == "vllm_colocate":
            return self._memory_with_vllm(rl, activations)
        if rl.rollouts.engine == "vllm_server":
            return self._memory(activations, trained=True, launched=rl.launch)
        # A merged copy samples, and stays in training; of a base in 4 bits or in parts there is none.
        merged = launch.gpu_split(rl.launch)[1] == 1 and not self.config.model.load_in_4bit
        copy = profiler.copy_mib if merged else 0.0
        training = self._memory(activations, trained=True, launched=rl.launch, copy=copy)
        slots = min(rl.prompts_per_step * rl.num_generations, rl.rollouts.batch_size)
        cache = profiler.kv_cache_mib(slots, prompt + rl.max_completion_length)
        decoding = self.generation[1].mib_of(slots)  # by whole layers, even where training divides them
        sampling = self._memory(decoding, trained=True, copy=copy, cache=cache)
        return max(training, sampling, key=lambda memory: memory.total)

    def _memory_with_vllm(self, rl: RlSection, activations: float) -> MemoryEstimate:
        """With vLLM on the same GPU, which may sleep while training passes are computed."""
        profiler = self.profiler
        alone = self._memory(0.0, trained=True, launched=rl.launch)
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
            return max(training, replace(alone, cache=cache), key=lambda memory: memory.total)
        return replace(training, cache=cache)

    def _eval(self, variant: str) -> Cost:
        """An answer to each item, see `_generation_s`; the check of the first answers takes little time.

        That check loads the model once more, beside the merged copy or the server that answers.
        """
        target, _, name = variant.partition("@")
        evaluation, rows = self.config.eval, self.texts.rows[name]
        section = evaluation.benchmarks[name]
        if target in UNTRAINED_TARGETS:
            rows = rows[: evaluation.untrained_items]
        if not rows or target == ROUTED:  # other steps' answers, and votes of a prompt that is not known here
            return UNKNOWN
        limit, slots = generation_limit(section), min(self.config.server.batch_size, len(rows))
        prompts = self.texts.prompts[name]
        trained = target not in UNTRAINED_TARGETS and self.texts.rows["train"]
        response = self._response_tokens(limit) if trained else float(limit)
        read_tokens = per_text(prompts[:PROMPT_SAMPLE], slots)
        thread_s = self._generation_s(len(rows) * section.samples, read_tokens, response)
        adapted, served = target != "base", evaluation.engine == "vllm"
        checked = (adapted or served) and evaluation.parity_items and not section.temperature
        copy = self.profiler.copy_mib if checked else 0.0
        cache = self.profiler.kv_cache_mib(slots, max(map(len, prompts)) + limit)
        decoding = self.generation[1].mib_of(slots)
        memory = None if served else self._memory(decoding, adapted=adapted, copy=copy, cache=cache)
        starts = SERVER_S if served and name == next(iter(evaluation.benchmarks)) else 0.0
        return self._cost(thread_s, memory, starts=starts, loads=1 + bool(checked))

    @cached_property
    def generation(self) -> tuple[Measurement, Measurement]:
        """Prefill and decoding, see `Profiler.measure_generation`."""
        return self.profiler.measure_generation(self.texts.typical_prompt)

    def _generation_s(self, answers: int, read_tokens: float, response: float) -> float:
        """answers · (read_tokens · prefill token_s + response · (1 + FREE) · decode token_s)

        Slots of answers that have ended are computed, too, until a share of FREE has ended.
        """
        prefill, decode = self.generation
        return answers * (read_tokens * prefill.token_s + response * (1 + FREE_SHARE) * decode.token_s)

    def _cost(
        self, thread_s: float, memory: MemoryEstimate | None, launched: LaunchSection | None = None,
        starts: float = 0.0, loads: int = 1,
    ) -> Cost:  # fmt: skip
        """thread_s: computation by one thread or one GPU. loads: of the model. starts: seconds of servers."""
        gpus = launch.gpu_split(launched)[0] if launched else 1
        seconds = thread_s / self.profiler.speedup / gpus + loads * self.profiler.loading_s + starts
        return Cost(seconds, memory)

    def _memory(
        self, activations: float, adapted: bool = False, trained: bool = False, copy: float = 0.0,
        cache: float = 0.0, launched: LaunchSection | None = None,
    ) -> MemoryEstimate:  # fmt: skip
        """copy: MiB of a second model. trained: the adapter, by Adam. launched: it may divide the layers."""
        profiler = self.profiler
        elements = profiler.adapter_elements if adapted or trained else 0
        divided = profiler.layers_mib * (1 - launch.gpu_split(launched)[1]) if launched else 0.0
        return MemoryEstimate(
            weights=profiler.weights_mib - divided + elements * 4 / MIB + copy,
            optimizer=elements * ADAM_BYTES / MIB * trained,
            activations=activations,
            cache=cache,
            libraries=profiler.libraries_mib,
        )
