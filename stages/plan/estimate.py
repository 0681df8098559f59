"""Time and memory of each step before it runs, and the lengths of texts beside their limits.

A stage says how many tokens it trains on, reads and writes (`Work`); some seconds of measuring say what one
of each takes here. Nobody knows yet how rows will be labelled, or how long answers get: half of the rows are
taken for System 1, and answers of a trained model for as long as the references. On a CPU one thread is
measured, in CPU time: other work on the machine does not change it.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from stages.config import ModelSection
from stages.errors import is_out_of_memory
from stages.pipeline.stage import TRAIN
from stages.pipeline.steps import Step
from stages.plan.tokens import Span, Work
from stages.runtime import libraries, resources
from stages.runtime.resources import MIB

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)

FEW_TOKENS = 256
"""Tokens of a batch measured on a CPU: a token of a smaller batch takes longer, of a larger one no less."""
SLOTS, NEW_TOKENS = 64, 4
"""Answers that are generated at a time to measure, and their tokens."""
GAIN = 0.75
"""n threads are taken to be n^GAIN times as fast as one: 1.67 times by two, measured."""
SERVER_S = 40.0
"""Seconds to start a vLLM server: 37 to 51 for 135 million parameters on two cores, more for more."""
ADAM_BYTES = 16
"""Bytes of a trained element of the adapter: gradient, Adam's two moments, index among the packed ones."""


@dataclass(frozen=True)
class Cost:
    """Cost of one step; None if it cannot be predicted: other machines or other people's code do the work."""

    seconds: float | None = None
    mib: float | None = None


@dataclass(frozen=True)
class Estimate:
    """Costs by step name, and what is known of the machine."""

    costs: dict[str, Cost]
    spans: list[Span]
    room: int | None = None
    """Memory of the device, in MiB; None if nothing was measured."""


def estimate(texts: Any, steps: list[Step]) -> Estimate:
    """Predict the cost of these steps from some seconds of measuring the model."""
    with libraries.hide_packages(*libraries.UNUSED):  # as in the stages: they take seconds, and memory
        import torch

        from stages.models.base import weights_mib

    config = texts.config
    unknown = {step.name: Cost() for step in steps}
    if not any(texts.rows[name] for name in (TRAIN, *config.eval.benchmarks)):
        return Estimate(unknown, [])
    lengths, room = _spans(texts, steps), resources.total_memory()
    # Loading what cannot fit would end this process on a CPU, where memory is promised before it is there.
    if not config.model.load_in_4bit and (weights := weights_mib(config.model)) > room:
        costs = {s.name: Cost(None, weights) if s.planned.holds_base else Cost() for s in steps}
        return Estimate(costs, lengths, room)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        measured = _Measured(texts)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        log.warning("the base does not fit on this device, so nothing could be measured")
        return Estimate(unknown, lengths, room)
    finally:
        torch.set_num_threads(threads)
    speedup = 1.0 if torch.cuda.is_available() else threads**GAIN
    works = {s.name: s.stage.work(texts, s.variant) if s.stage.work else None for s in steps}
    costs = {name: Cost() if work is None else measured.cost(work, speedup) for name, work in works.items()}
    return Estimate(costs, lengths, room)


def _spans(texts: Any, steps: list[Step]) -> list[Span]:
    """The lengths of all texts that these steps read; of those of one name the longest."""
    longest: dict[str, Span] = {}
    for span in (span for step in steps for span in step.stage.spans(texts, step.variant)):
        if span.name not in longest or span.lengths.longest > longest[span.name].lengths.longest:
            longest[span.name] = span
    return list(longest.values())


class _Measured:
    """Cost of tokens on this process's device: to train on, to read, and to write."""

    def __init__(self, texts: Any) -> None:
        import torch

        from stages.engines import Sampling
        from stages.engines.continuous_batching import generate
        from stages.lora.adapter import adapter
        from stages.packing import support
        from stages.packing.batch import PackedBatch
        from stages.packing.trainer_inputs import groups_of_rows

        config = texts.config
        self._on_gpu = torch.cuda.is_available()
        base = self._load(config.model)
        rank = config.lora.r * (2 if config.lora.compensated else 1)
        lora = config.lora.model_copy(update={"init": "normal", "r": rank})
        model = adapter.initial(base, lora, config.seed)
        self.elements = sum(layer.weight.numel() for layer in adapter.lora_layers(model).values())
        prompt = texts.typical_prompt
        packs = support.supports_packing(base, prompt[:64])
        row = (prompt * (1 + FEW_TOKENS // len(prompt)))[:FEW_TOKENS]

        def train() -> None:
            ids = torch.tensor([row], device=base.device)
            if packs:
                batch = PackedBatch.from_groups(groups_of_rows([row], [row], False), base.device)
                support.packed_logprobs(model, batch).log_probs.sum().backward()
            else:
                model(input_ids=ids, labels=ids).loss.backward()
            model.zero_grad()

        def write(tokens: int) -> Callable[[], object]:
            prompts = [[i, *prompt[1:]] for i in range(SLOTS // 8) for _ in range(8)]
            answers = (model, texts.tokenizer, prompts, Sampling(tokens, ()))
            return lambda: deque(generate(*answers, slots=SLOTS), maxlen=0)

        model.train()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(model.prefix in name)
        seconds, mib = self._time(train)
        self.train_s, self.train_mib = seconds / len(row), mib / len(row)
        model.eval()
        read_s, _ = self._time(write(1))
        written_s, self.write_mib = self._time(write(1 + NEW_TOKENS), times=1)
        self.read_s = read_s / (SLOTS * len(prompt) / (8 if packs else 1))
        self.write_s = max(0.0, written_s - read_s) / (SLOTS * NEW_TOKENS)

    def _load(self, model: ModelSection) -> PreTrainedModel:
        from stages.models.base import load_base
        from stages.models.size import kv_cache_bytes

        resources.reset_peak()
        begin = self._clock()
        base = load_base(model)
        self.loading_s = self._clock() - begin
        self.weights_mib = sum({p.data_ptr(): p.nbytes for p in base.parameters()}.values()) / MIB
        self.libraries_mib = max(0.0, resources.peak_device_memory() - self.weights_mib)
        self.token_mib = kv_cache_bytes(base.config.get_text_config(), base.dtype.itemsize) / MIB
        return base

    def cost(self, work: Work, speedup: float) -> Cost:
        thread_s = work.trained * self.train_s + work.read * self.read_s + work.written * self.write_s
        seconds = thread_s / speedup + self.loading_s + work.servers * SERVER_S
        trained = self.elements * (4 + ADAM_BYTES) / MIB if work.trained else 0.0
        passes = work.batch * self.train_mib
        sampling = work.slots * (work.length * self.token_mib + self.write_mib / SLOTS)
        mib = work.copies * self.weights_mib + trained + max(passes, sampling) + self.libraries_mib
        return Cost(seconds, None if work.servers else mib)

    def _time(self, call: Callable[[], object], times: int = 2) -> tuple[float, float]:
        """Seconds of the last call, and MiB beyond what was in use; calls before it warm up the kernels."""
        seconds = mib = 0.0
        for _ in range(times):
            resources.reset_peak()
            in_use, begin = resources.peak_device_memory(), self._clock()
            call()
            seconds, mib = self._clock() - begin, resources.peak_device_memory() - in_use
        return seconds, mib

    def _clock(self) -> float:
        import torch

        if self._on_gpu:
            torch.cuda.synchronize()
        return time.perf_counter() if self._on_gpu else time.thread_time()
