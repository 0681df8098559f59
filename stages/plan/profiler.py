"""Measures each kind of work on this machine: votes, prefill, decoding, and a forward and backward pass.

On a CPU one thread computes a small batch, and its CPU time counts: other work on the machine does not change
it, and it grows in proportion to the tokens. (Several threads that wait for cores wait for each other, too.)
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch

from stages.config import Config, RlSection
from stages.engines import ChoiceRequest, Sampling
from stages.engines.continuous_batching import SLOTS, generate
from stages.engines.in_process import InProcess
from stages.lora.adapter import adapter
from stages.lora.grpo import vllm_rollouts
from stages.lora.grpo.int8 import linear_layers_in_int8
from stages.models.base import decoder_layers, load_base
from stages.models.size import kv_cache_bytes
from stages.packing import support
from stages.packing.batch import PackedBatch, common_prefix_length
from stages.packing.logprobs import selected_logprobs
from stages.packing.trainer_inputs import groups_of_rows
from stages.prompts.renderer import Row
from stages.runtime import resources

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FEW_TOKENS = 256
"""Tokens of a batch measured on a CPU: a token of a smaller batch takes longer, of a larger one no less."""
CHECKED_TOKENS = 64
"""Tokens on which packing is compared with the model's own computation."""
ENOUGH_S = 0.5
"""A measurement that takes less is repeated: the first one also warms up caches and kernels."""
GENERATIONS = 8
"""Answers to one prompt."""
NEW_TOKENS = 3
"""Decoding steps that are measured."""
BUSY_CORES = 0.3
"""Cores that other work keeps busy before this machine is called busy; an idle system takes less."""
GAIN = 0.75
"""n threads are taken to be n^GAIN times as fast as one: 1.67 times by two, measured."""


@dataclass(frozen=True)
class Measurement:
    """Time of a batch, and its memory beyond what was in use."""

    tokens: int
    seconds: float
    mib: float

    @property
    def token_s(self) -> float:
        return self.seconds / self.tokens

    def mib_of(self, tokens: float) -> float:
        """Memory of a batch of so many tokens; a smaller one may take as much as the measured one."""
        return self.mib * max(1.0, tokens / self.tokens)


@contextmanager
def one_thread() -> Iterator[int]:
    """Inside, torch computes with one thread. Yields the number of threads outside."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield threads
    finally:
        torch.set_num_threads(threads)


class Profiler:
    """The base model of a config with an adapter, on this process's device; for use in `one_thread`."""

    def __init__(self, config: Config, tokenizer: PreTrainedTokenizerBase, threads: int) -> None:
        self.on_gpu = torch.cuda.is_available()
        self.speedup = 1.0 if self.on_gpu else threads**GAIN
        self._start = time.perf_counter(), time.process_time(), resources.busy_seconds()
        resources.reset_peak()
        self.config, self.tokenizer = config, tokenizer
        begin = self._clock()
        self.base = load_base(config.model)
        self.loading_s = self._clock() - begin
        self.room = resources.total_memory()
        weights = {p.data_ptr(): p.nbytes for p in self.base.parameters()}  # tied weights count once
        self.weights_mib = sum(weights.values()) / resources.MIB
        self.copy_mib = 0.0 if self.on_gpu else self.weights_mib  # on a GPU no stage holds a second copy
        self.libraries_mib = max(0.0, resources.peak_device_memory() - self.weights_mib)
        layers = [p.nbytes for layer in decoder_layers(self.base) for p in layer.parameters()]
        self.layers_mib = sum(layers) / resources.MIB
        """Weights that fsdp2 divides."""
        self._votes: Measurement | None = None
        self._training: dict[tuple[Any, ...], Measurement] = {}

    def measure_votes(self, ballots: list[ChoiceRequest]) -> Measurement:
        """Votes by engine transformers, whose texts are token ids; measured once for all voters."""
        if self._votes is None:
            ballots = sorted(ballots, key=lambda ballot: ballot.text)
            texts: Any = [ballot.text for ballot in ballots]
            number, tokens = self._tokens_to_measure(texts, sharing=True)
            engine = InProcess(self.base, self.tokenizer, self.config.server.batch_size)
            self.supports_packing(texts[0])  # with few tokens; the engine would take all of a long prompt
            seconds, mib = self._time(lambda: deque(engine.choose_words(ballots[:number]), maxlen=0))
            self._votes = Measurement(tokens, seconds, mib)
        return self._votes

    def measure_training(
        self, rows: Sequence[Row], packed: bool, dropout: float, checkpointing: bool, sharing: bool = True
    ) -> Measurement:
        """A micro batch, forward and backward; on a CPU only its first rows, of about FEW_TOKENS tokens.

        Each kind is measured once: a token took 5.3 ms in SFT, 5.3 to 5.6 in GRPO and 5.7 in score. On a GPU,
        where batches of other sizes take other memory, it is once for each size, too. sharing: a common
        beginning is computed once, where rows are packed without dropout.
        """
        packed = packed and self.supports_packing(rows[0].input_ids)
        sharing, texts = sharing and packed and not dropout, [row.input_ids for row in rows]
        number, tokens = self._tokens_to_measure(texts, sharing)
        kind = (packed, bool(dropout), checkpointing, *((sharing, tokens) if self.on_gpu else ()))
        if kind in self._training:
            return self._training[kind]
        model = self.adapted
        ids, labels = texts[:number], [row.labels for row in rows[:number]]

        def work() -> None:
            if packed:
                batch = PackedBatch.from_groups(groups_of_rows(ids, labels, sharing), self.base.device)
                support.packed_logprobs(model, batch).log_probs.sum().backward()
            else:
                width = max(map(len, ids))  # shorter rows are repeated where a batch has padding
                padded = torch.tensor([(row * width)[:width] for row in ids], device=self.base.device)
                # As TRL does, the head is applied in parts, and not all logits are kept.
                states = self.base.base_model(input_ids=padded, use_cache=False).last_hidden_state
                hidden, targets = states[:, :-1].flatten(0, 1), padded[:, 1:].flatten()
                head = self.base.get_output_embeddings()
                selected_logprobs(hidden, head, targets).log_probs.sum().backward()
            model.zero_grad()

        model.train()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(model.prefix in name)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()
        with adapter.lora_dropout(model, dropout):
            self._training[kind] = Measurement(tokens, *self._time(work))
        if checkpointing:
            model.gradient_checkpointing_disable()
        return self._training[kind]

    def measure_generation(self, prompt: list[int], in_int8: bool) -> tuple[Measurement, Measurement]:
        """Prefill for SLOTS answers, GENERATIONS to a prompt, and a decoding step, of one token for each.

        The step is the difference between generating one token and 1 + NEW_TOKENS, over NEW_TOKENS.
        """
        # Each group of GENERATIONS has a first token of its own: answers to one prompt share its prefill, and
        # different prompts have no common beginning.
        prompts = [[i, *prompt[1:]] for i in range(SLOTS // GENERATIONS) for _ in range(GENERATIONS)]
        tokens = len(prompts) * len(prompt) // (GENERATIONS if self.supports_packing(prompt) else 1)
        read_s, read_mib = self._time(lambda: self._generate(prompts, 1, in_int8))
        written_s, written_mib = self._time(lambda: self._generate(prompts, 1 + NEW_TOKENS, in_int8))
        step_s = max(0.0, written_s - read_s) / NEW_TOKENS
        step_mib = max(0.0, written_mib - self.kv_cache_mib(SLOTS, len(prompt) + NEW_TOKENS))
        return Measurement(tokens, read_s, read_mib), Measurement(SLOTS, step_s, step_mib)

    def _generate(self, prompts: list[list[int]], tokens: int, in_int8: bool) -> None:
        """Rollouts use a merged copy on a CPU, which is as fast as the base, and else the adapter."""
        adapted = self.on_gpu or self.config.model.load_in_4bit
        model = self.adapted if adapted else self.base
        off = nullcontext() if adapted or "adapted" not in vars(self) else self.adapted.disable_adapter()
        with off, linear_layers_in_int8(self.base, prompts[0]) if in_int8 else nullcontext():
            answers = generate(model, self.tokenizer, prompts, Sampling(tokens, ()), slots=len(prompts))
            deque(answers, maxlen=0)

    def supports_packing(self, ids: list[int]) -> bool:
        """True if the architecture computes rows without padding. ids: any real ones."""
        return support.supports_packing(self.base, ids[:CHECKED_TOKENS])

    @cached_property
    def adapted(self) -> Any:
        """The base with an adapter, whose initial values do not matter here."""
        lora = self.config.lora
        rank = lora.r * (2 if lora.compensated else 1)
        lora = lora.model_copy(update={"init": "normal", "compensate": False, "r": rank})
        return adapter.initial(self.base, lora, self.config.seed)

    @cached_property
    def adapter_elements(self) -> int:
        return sum(layer.weight.numel() for layer in adapter.lora_layers(self.adapted).values())

    def kv_cache_mib(self, rows: int, length: int) -> float:
        token = kv_cache_bytes(self.base.config.get_text_config(), self.base.dtype.itemsize)
        return rows * length * token / resources.MIB

    def colocated_mib(self, rl: RlSection, free_mib: float, processes: int) -> float:
        """Memory of a vLLM on the trainer's GPU; ConfigError if it does not fit into what is free."""
        token = kv_cache_bytes(self.base.config.get_text_config(), vllm_rollouts.ITEMSIZE)
        free, parameters = int(free_mib * resources.MIB), self.base.num_parameters()
        return vllm_rollouts.colocated_bytes(rl, parameters, token, free, processes) / resources.MIB

    def busy_cores(self) -> float | None:
        """Usable cores that other work has kept busy since the start; None if unknown or below BUSY_CORES.

        (seconds of all work on these cores - CPU time of this process) / wall time
        """
        wall, process, machine = self._start
        now = resources.busy_seconds()
        if machine is None or now is None:
            return None
        cores = (now - machine - (time.process_time() - process)) / (time.perf_counter() - wall)
        return cores if cores > BUSY_CORES else None

    def _tokens_to_measure(self, texts: Sequence[list[int]], sharing: bool) -> tuple[int, int]:
        """The number of texts to measure, of FEW_TOKENS together (on a GPU all texts), and their tokens."""
        number = tokens = 0
        while number < len(texts) and (self.on_gpu or tokens < FEW_TOKENS):
            number += 1
            tokens = round(number * per_text(texts[:number], number if sharing else 1))
        return number, tokens

    def _time(self, work: Callable[[], Any]) -> tuple[float, float]:
        """Seconds, and MiB beyond what was in use."""
        seconds = mib = 0.0
        for _ in range(2):
            resources.reset_peak()
            in_use, begin = resources.peak_device_memory(), self._clock()
            work()
            if self.on_gpu:
                torch.cuda.synchronize()
            seconds, mib = self._clock() - begin, resources.peak_device_memory() - in_use
            if seconds >= ENOUGH_S:
                break
        return seconds, mib

    def _clock(self) -> float:
        """Seconds; on a CPU of this thread alone, in which other work on the machine does not count."""
        return time.perf_counter() if self.on_gpu else time.thread_time()


def per_text(texts: Sequence[list[int]], size: int) -> float:
    """Mean tokens that are computed of a text, in batches of `size` that compute a common beginning once:

    mean length - common beginning · (1 - 1 / size)
    """
    return fmean(map(len, texts)) - common_prefix_length(texts) * (1 - 1 / size)
