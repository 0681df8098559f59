"""What a model in this process writes: each prompt is computed once, and ended answers cost nothing."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from stages.engines import Completion, Sampling
from stages.engines.kv_cache import KVCache, Prefill
from stages.packing import support
from stages.packing.batch import PackedBatch

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SLOTS = 64
"""Answers that are written at a time, unless a setting says otherwise."""
FREE = 0.25
"""Share of the slots that must be free before other prompts take them, or before they are given up."""


@dataclass(frozen=True)
class StopConditions:
    """What ends an answer: a stop token, one of the texts, or its length."""

    sampling: Sampling
    tokenizer: PreTrainedTokenizerBase
    texts: tuple[str, ...] = ()

    def reached(self, ids: list[int]) -> bool:
        """Whether the last token ends the answer, for another reason than its length."""
        if ids[-1] in self.sampling.stop_ids:
            return True
        if not self.texts:
            return False
        window = max(len(text.encode()) for text in self.texts) + 4  # a token is at least one byte
        written = self.tokenizer.decode(ids[-window:])
        return any(text in written for text in self.texts)


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    sampling: Sampling,
    stops: tuple[str, ...] = (),
    seeds: list[int] | None = None,
    slots: int = SLOTS,
) -> Iterator[tuple[int, Completion]]:
    """What the model writes after each prompt, as soon as it is written: the prompt's index and the answer.

    An answer goes up to the first stop token or text, which is included. seeds: one for each prompt, needed
    with a temperature; an answer follows from its seed, but for the rounding of what is computed beside it.
    slots: answers that are written at a time.
    """
    ends = StopConditions(sampling, tokenizer, stops)
    seeds = seeds or [0] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda i: prompts[i])  # equal beginnings stand together
    if prompts and support.supports_packing(model, prompts[0]):
        yield from _Batcher(model, ends, min(slots, len(prompts))).write(prompts, seeds, order)
        return
    for part in _batches(model, prompts, slots):
        made = _by_library(model, ends, [prompts[i] for i in part], seeds[part[0]])
        yield from zip(part, made, strict=True)


@dataclass
class _Slot:
    """An answer that is being written."""

    item: int
    row: int
    at: int
    """Position of the token that comes next."""
    draws: list[float]
    ids: list[int] = field(default_factory=list)
    complete: bool = False
    over: bool = False


class _Batcher:
    """Writes answers in a number of slots. A slot whose answer has ended takes the next prompt."""

    def __init__(self, model: PreTrainedModel, ends: StopConditions, slots: int) -> None:
        self.model, self.ends, self.slots = model, ends, slots
        self.memory = KVCache(slots)

    @torch.no_grad()
    def write(
        self, prompts: list[list[int]], seeds: list[int], order: list[int]
    ) -> Iterator[tuple[int, Completion]]:
        waiting, lines, free = deque(order), list[_Slot](), list(range(self.slots))
        while waiting or lines:
            if waiting and (not lines or len(free) >= FREE * self.slots):
                new = [waiting.popleft() for _ in range(min(len(free), len(waiting)))]
                begun = [_Slot(i, free.pop(), len(prompts[i]), self._draws(seeds[i])) for i in new]
                logits = self._read([prompts[i] for i in new], [line.row for line in begun])
                lines += begun
            else:
                begun = lines
                logits = self._next(lines)
            for line, token in zip(begun, self._pick(logits, begun), strict=True):
                line.ids.append(token)
                line.complete = self.ends.reached(line.ids)
                line.over = line.complete or len(line.ids) == self.ends.sampling.max_new_tokens
            for line in begun:
                if line.over:
                    free.append(line.row)
                    yield line.item, Completion(line.ids, line.complete)
            lines = [line for line in lines if not line.over]
            if not waiting and lines and len(lines) <= (1 - FREE) * self.memory.rows:
                self._close_up(lines)

    def _draws(self, seed: int) -> list[float]:
        """One number in [0, 1) for each token, so that no answer depends on the others."""
        if not self.ends.sampling.temperature:
            return []
        generator = torch.Generator().manual_seed(seed)
        return torch.rand(
            self.ends.sampling.max_new_tokens, generator=generator, dtype=torch.float64
        ).tolist()  # type: ignore[no-any-return]

    def _read(self, prompts: list[list[int]], rows: list[int]) -> Tensor:
        """Compute the prompts, each once, and keep their keys and values in these rows.

        Returns the logits after each prompt: (prompts, vocabulary).
        """
        unique = [list(ids) for ids in dict.fromkeys(map(tuple, prompts))]
        place = {tuple(ids): i for i, ids in enumerate(unique)}
        row = PackedBatch.of_prompts(unique, self.model.device)
        owner = torch.tensor([place[tuple(ids)] for ids in prompts], device=self.model.device)
        self.memory.reserve(max(map(len, unique)) + 1)
        reading = Prefill(row, self.memory, owner, self._tensor(rows))
        states = support.packed_hidden_states(self.model, row.input_ids, row.position_ids, reading)
        return self._logits(states[0, row.target_positions()])[owner]

    def _next(self, lines: list[_Slot]) -> Tensor:
        """Compute the last token of each line: logits (lines, vocabulary)."""
        at = self._tensor([line.at for line in lines])
        self.memory.set_positions(self._tensor([line.row for line in lines]), at)
        tokens = self._tensor([line.ids[-1] for line in lines])
        for line in lines:
            line.at += 1
        return self._logits(support.packed_hidden_states(self.model, tokens[None], at[None], self.memory)[0])

    def _logits(self, states: Tensor) -> Tensor:
        return self.model.get_output_embeddings()(states).float()  # type: ignore[no-any-return]

    def _pick(self, logits: Tensor, lines: list[_Slot]) -> list[int]:
        sampling = self.ends.sampling
        if not sampling.temperature:
            return logits.argmax(-1).tolist()  # type: ignore[no-any-return]
        draws = [line.draws[len(line.ids)] for line in lines]
        return sample_tokens(logits, sampling, torch.tensor(draws, device=logits.device)).tolist()  # type: ignore[no-any-return]

    def _close_up(self, lines: list[_Slot]) -> None:
        self.memory.compact(self._tensor([line.row for line in lines]))
        for row, line in enumerate(lines):
            line.row = row

    def _tensor(self, values: list[Any]) -> Tensor:
        return torch.tensor(values, device=self.model.device)


def sample_tokens(logits: Tensor, sampling: Sampling, draws: Tensor) -> Tensor:
    """Tokens of the distributions in `logits` (rows, vocabulary), by one number in [0, 1) for each row.

    It is the first token, in the order of the vocabulary, with which the probabilities add up to more.
    """
    from transformers import TopKLogitsWarper, TopPLogitsWarper

    logits = logits / sampling.temperature
    if 0 < sampling.top_k < logits.shape[-1]:
        logits = TopKLogitsWarper(sampling.top_k)(None, logits)
    if sampling.top_p < 1:
        logits = TopPLogitsWarper(sampling.top_p)(None, logits)
    # In float32 a sum near 1 would lose every token of a probability below 6e-8.
    sums = logits.softmax(-1).cumsum(-1, dtype=torch.float64)
    found = torch.searchsorted(sums, draws.double()[:, None] * sums[:, -1:], right=True)
    return found[:, 0].clamp_(max=logits.shape[-1] - 1)


def _batches(model: Any, prompts: list[list[int]], size: int) -> Iterator[list[int]]:
    """Indices of prompts of similar length; with a trained prompt of one length, see `flat.has_prompt`."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    while order:
        same = len(prompts[order[0]])
        part = [i for i in order[:size] if len(prompts[i]) == same or not support.is_prompt_learning(model)]
        order = order[len(part) :]
        yield part


def padded(prompts: list[list[int]], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask, padded on the left: (prompts, longest) each."""
    width = max(map(len, prompts))
    ids = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in prompts], device=device)
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    return ids, (torch.arange(width, device=device) >= width - lengths[:, None]).long()


@torch.no_grad()
def _by_library(model: Any, ends: StopConditions, prompts: list[list[int]], seed: int) -> list[Completion]:
    """The same by the library's own generation, padded on the left; the whole batch has one seed."""
    sampling, pad = ends.sampling, ends.tokenizer.pad_token_id
    ids, mask = padded(prompts, pad, model.device)
    width = ids.shape[1]
    how: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    if sampling.temperature:
        drawn = {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k}
        how = {"do_sample": True, **drawn}
    if ends.texts:
        how["stopping_criteria"] = [_AtText(ends, width)]
    with torch.random.fork_rng(), _no_defaults_of(model):
        torch.manual_seed(seed)
        written = model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=sampling.max_new_tokens,
            eos_token_id=list(sampling.stop_ids),
            pad_token_id=pad,
            **how,
        )[:, width:]
    return [_answer(row, ends) for row in written.tolist()]


@contextmanager
def _no_defaults_of(model: Any) -> Iterator[None]:
    """Inside, the model's generation_config.json, such as its penalties, changes nothing that is written.

    The library would fill in what it is not told, and no other way of writing here reads that file.
    """
    from transformers import GenerationConfig

    owner = model.get_base_model() if hasattr(model, "get_base_model") else model
    kept, owner.generation_config = owner.generation_config, GenerationConfig()
    try:
        yield
    finally:
        owner.generation_config = kept


class _AtText:
    """Ends a row once it has generated one of the texts; the library's criterion also matches the prompt."""

    def __init__(self, ends: StopConditions, prompt_tokens: int) -> None:
        self.ends, self.start = ends, prompt_tokens

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        ended = [self.ends.reached(row) for row in input_ids[:, self.start :].tolist()]
        return torch.tensor(ended, device=input_ids.device)


def _answer(ids: list[int], ends: StopConditions) -> Completion:
    """The answer in a row, up to its end: rows that end before others are padded."""
    for number in range(1, len(ids) + 1):
        if ends.reached(ids[:number]):
            return Completion(ids[:number], True)
    return Completion(ids, False)
