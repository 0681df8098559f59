"""Measures one small batch of each kind of work on this machine, computed as the stages compute it.

On a CPU a batch is computed by one thread, and its CPU time counts: other work on the machine does not change
it, and it grows in proportion to the tokens. What several threads gain is measured once, if they have the
cores to themselves.
"""

from __future__ import annotations

import functools
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from stages.config import Config, RlSection, SftSection
from stages.engines import ChoiceRequest, Sampling
from stages.engines.continuous_batching import SLOTS, generate
from stages.engines.in_process import InProcess, choice_ids
from stages.lora.adapter import adapter
from stages.lora.importance.scorers import moments
from stages.models.base import decoder_layers, load_base
from stages.packing import support
from stages.packing.batch import PackedBatch, common_prefix_length
from stages.packing.trl import suffix_only
from stages.prompts.renderer import Row
from stages.runtime import resources

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

FEW_TOKENS = 256
"""Tokens that a batch measured on a CPU has: of fewer each takes longer, and of more none takes less."""
TRIALS, ENOUGH_S = 2, 1.0
"""The fastest of so many trials counts, or of fewer that take so many seconds."""
TOGETHER = 8
"""Answers to one prompt."""
NEW_TOKENS = 3
"""Tokens that are written after a prompt, to find out what one takes."""
BUSY_CORES = 0.3
"""Cores that others keep busy before this machine is called busy: a system at rest takes less."""
GAIN = 0.75
"""On a busy machine n threads are taken to be n^GAIN times as fast as one: 1.67 times by two, measured."""


@dataclass(frozen=True)
class Measurement:
    """A batch of work."""

    tokens: int
    seconds: float
    mib: float
    """The memory that it took beyond what was in use before."""

    @property
    def token_s(self) -> float:
        return self.seconds / self.tokens

    def mib_of(self, tokens: float) -> float:
        """Memory for so many tokens; a batch of fewer may keep as much as this one."""
        return self.mib * max(1.0, tokens / self.tokens)


@contextmanager
def one_thread() -> Iterator[int]:
    """Inside, torch computes with one thread. Gives how many there are else."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield threads
    finally:
        torch.set_num_threads(threads)


class Profiler:
    """The base model of a config with an adapter, on this process's device; for use in `one_thread`."""

    def __init__(self, config: Config, tokenizer: PreTrainedTokenizerBase) -> None:
        self._on_gpu = torch.cuda.is_available()
        self._begun = time.perf_counter(), time.process_time(), resources.busy_seconds()
        resources.reset_peak()
        self.config, self.tokenizer = config, tokenizer
        loaded: list[PreTrainedModel] = []
        self.loading_s = self._seconds(lambda: loaded.append(load_base(config.model)))
        self.base = loaded[0]
        peak = resources.peak_of_scarce()
        self.room = resources.total_memory()
        weights = {p.data_ptr(): p.nbytes for p in self.base.parameters()}
        self.weights_mib = sum(weights.values()) / resources.MIB
        layers = [p.nbytes for layer in decoder_layers(self.base) for p in layer.parameters()]
        self.layers_mib = sum(layers) / resources.MIB
        """Weights that fsdp2 divides."""
        self.libraries_mib = max(0.0, peak - self.weights_mib)
        self._votes: Measurement | None = None
        self._trained: dict[tuple[bool, bool, bool], Measurement] = {}
        self._last: tuple[Callable[[], Any], float] | None = None
        """What was measured last, and its seconds."""

    def votes(self, ballots: list[ChoiceRequest]) -> Measurement:
        """Votes of engine transformers."""
        engine = InProcess(self.base, self.tokenizer, self.config.server.batch_size)
        ballots = sorted(ballots, key=lambda ballot: choice_ids(self.tokenizer, ballot))
        ids = [choice_ids(self.tokenizer, ballot) for ballot in ballots]

        def work(number: int) -> None:
            deque(engine.choose(ballots[:number]), maxlen=0)

        if self._votes is None:
            self.fits(ids[0][:FEW_TOKENS])  # which is asked once, and takes long with long texts
            self._votes = self._measured(work, lambda number: computed(ids[:number]), len(ballots))
        return self._votes

    def generation(self, prompt: list[int]) -> tuple[Measurement, Measurement]:
        """Reading prompts; then one more token for each of several answers, which count as the tokens."""
        number = SLOTS // TOGETHER
        prompts = [[i, *prompt[1:]] for i in range(number) for _ in range(TOGETHER)]
        tokens = number * (1 if self.fits(prompt) else TOGETHER) * len(prompt)
        read_s, read_mib = self._fastest(lambda: self._write(prompts, 1))
        written_s, written_mib = self._fastest(lambda: self._write(prompts, NEW_TOKENS + 1))
        cache = len(prompts) * (len(prompt) + NEW_TOKENS) * self.token_bytes / resources.MIB
        each = max(0.0, written_s - read_s) / NEW_TOKENS
        return Measurement(tokens, read_s, read_mib), Measurement(SLOTS, each, max(0.0, written_mib - cache))

    def scoring(self, rows: Sequence[Row]) -> Measurement:
        """A batch of score, the gradients of each row by itself."""
        model = self.adapted
        layers, pad = adapter.lora_layers(model), self.tokenizer.pad_token_id

        def work(number: int) -> None:
            model.requires_grad_(False)
            model.eval()
            moments(model, layers, [list(rows[:number])], lambda _: None, pad)

        return self._measured(
            work, lambda number: sum(len(row.input_ids) for row in rows[:number]), len(rows)
        )

    def training(self, rows: Sequence[Row], section: SftSection | RlSection, unpadded: bool) -> Measurement:
        """A micro batch, forward and backward. SFT and GRPO compute alike, so their tokens take as long."""
        unpadded = unpadded and self.fits(rows[0].input_ids)
        kind = (bool(section.lora_dropout), section.gradient_checkpointing, unpadded)
        if kind not in self._trained:
            self._trained[kind] = self._train(rows, section, unpadded)
        return self._trained[kind]

    def _train(self, rows: Sequence[Row], section: SftSection | RlSection, unpadded: bool) -> Measurement:
        model = self.adapted
        model.train()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(model.prefix in name)
        if section.gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()

        def work(number: int) -> None:
            ids = [row.input_ids for row in rows[:number]]
            if unpadded:
                labels = [row.labels for row in rows[:number]]
                group = suffix_only(ids, labels, shares=not section.lora_dropout)
                support.packed_logprobs(
                    model, PackedBatch.of([group], self.base.device)
                ).log_probs.sum().backward()
            else:
                width = max(map(len, ids))
                batch = torch.tensor([(row * width)[:width] for row in ids], device=self.base.device)
                model(input_ids=batch, labels=batch).loss.backward()
            model.zero_grad()

        def tokens(number: int) -> int:
            return computed([row.input_ids for row in rows[:number]], unpadded and not section.lora_dropout)

        with adapter.dropping_out(model, section.lora_dropout):
            measured = self._measured(work, tokens, len(rows))
        if section.gradient_checkpointing:
            model.gradient_checkpointing_disable()
        return measured

    def fits(self, ids: list[int]) -> bool:
        """Whether the architecture computes rows without padding. ids: any real ones."""
        return support.supports_packing(self.base, ids)

    @cached_property
    def adapted(self) -> Any:
        """The base with an adapter; how that begins does not matter here."""
        lora = self.config.lora
        rank = lora.r * (2 if lora.compensated else 1)
        lora = lora.model_copy(update={"init": "normal", "compensate": False, "r": rank})
        return adapter.initial(self.base, lora, self.config.seed)

    @cached_property
    def adapter_elements(self) -> int:
        return sum(layer.weight.numel() for layer in adapter.lora_layers(self.adapted).values())

    @cached_property
    def token_bytes(self) -> int:
        """Keys and values of one token, in all layers."""
        config = self.base.config.get_text_config()
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return int(2 * config.num_hidden_layers * heads * width * self.base.dtype.itemsize)

    @property
    def copy_mib(self) -> float:
        """The base once more: on a GPU no stage holds it twice."""
        return 0.0 if self._on_gpu else self.weights_mib

    def busy_cores(self) -> float | None:
        """How many of our cores other work has kept busy; None if that is not known or is little."""
        begun, own, worked = self._begun
        now = resources.busy_seconds()
        if worked is None or now is None:
            return None
        others = now - worked - (time.process_time() - own)
        cores = others / (time.perf_counter() - begun)
        return cores if cores > BUSY_CORES else None

    def speedup(self, threads: int) -> float:
        """How many times as fast as one thread so many are, with what was measured last."""
        if threads == 1 or self._on_gpu or self._last is None:
            return 1.0
        if self.busy_cores():
            return float(threads**GAIN)
        work, alone = self._last
        torch.set_num_threads(threads)
        seconds = [self._seconds(work, time.perf_counter) for _ in range(2)]  # the first starts the threads
        torch.set_num_threads(1)
        return max(1.0, alone / min(seconds))

    def _write(self, prompts: Sequence[list[int]], tokens: int) -> None:
        """Without the adapter where rollouts have a merged copy, which is on a CPU."""
        through = self._on_gpu or self.config.model.load_in_4bit
        model = self.adapted if through else self.base
        sampling = Sampling(tokens, ())
        off = nullcontext() if through or "adapted" not in vars(self) else self.adapted.disable_adapter()
        with off:
            made = generate(model, self.tokenizer, list(prompts), sampling, slots=len(prompts))
            deque(made, maxlen=0)

    def _measured(self, work: Callable[[int], Any], tokens: Callable[[int], int], most: int) -> Measurement:
        """A batch of at most `most` rows: on a CPU so many as have FEW_TOKENS, on a GPU all of them.

        tokens: of the batch, by the number of its rows.
        """
        enough = math.inf if self._on_gpu else FEW_TOKENS
        number = next((n for n in range(1, most) if tokens(n) >= enough), most)
        measured = Measurement(tokens(number), *self._fastest(functools.partial(work, number)))
        self._last = functools.partial(work, number), measured.seconds
        return measured

    def _fastest(self, work: Callable[[], Any]) -> tuple[float, float]:
        trials = [self._trial(work)]
        while len(trials) < TRIALS and sum(seconds for seconds, _ in trials) < ENOUGH_S:
            trials.append(self._trial(work))
        return min(trials)

    def _trial(self, work: Callable[[], Any]) -> tuple[float, float]:
        """Seconds, and MiB beyond what is in use before."""
        resources.reset_peak()
        before = resources.peak_of_scarce()
        seconds = self._seconds(work)
        return seconds, resources.peak_of_scarce() - before

    def _seconds(self, work: Callable[[], Any], clock: Callable[[], float] | None = None) -> float:
        """On a CPU those of this thread alone, in which others on the machine do not count."""
        clock = clock or (time.perf_counter if self._on_gpu else time.thread_time)
        begun = clock()
        work()
        if self._on_gpu:
            torch.cuda.synchronize()
        return clock() - begun


def computed(texts: Sequence[list[int]], shares: bool = True) -> int:
    """Tokens that are computed where these texts are a batch, in which a common beginning stands once."""
    return sum(map(len, texts)) - shares * (len(texts) - 1) * common_prefix_length(texts)
