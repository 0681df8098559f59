"""Continuous batching for a model in this process.

Each distinct prompt is prefilled once, and the slot of an ended completion goes to the next prompt.
"""

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from stages.engines import Completion, Sampling
from stages.engines.kv_cache import KVCache, Prefill
from stages.packing import support
from stages.packing.batch import PackedBatch, padded

SLOTS = 64
"""Completions that are decoded at the same time, unless a setting says otherwise."""
FREE_SHARE = 0.25
"""Share of free slots at which waiting prompts are prefilled or, if none waits, the KV cache shrinks."""


@dataclass(frozen=True)
class StopConditions:
    """The conditions that end a completion: a stop token, a stop text or the length limit."""

    sampling: Sampling
    tokenizer: PreTrainedTokenizerBase
    texts: tuple[str, ...] = ()

    def reached(self, ids: list[int]) -> bool:
        """True if the last token completes a stop token or text; the length limit is not checked here."""
        if ids[-1] in self.sampling.stop_ids:
            return True
        if not self.texts:
            return False
        # A token has at least one byte, so a text of n bytes that has just ended begins in the last n tokens.
        # Four more tokens, for the bytes of the longest UTF-8 character: if the window begins inside a
        # character, the rest of that decodes to replacement characters before the text, not within it.
        window = max(len(text.encode()) for text in self.texts) + 4
        tail = self.tokenizer.decode(ids[-window:])
        return any(text in tail for text in self.texts)


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    sampling: Sampling,
    stops: tuple[str, ...] = (),
    seeds: list[int] | None = None,
    slots: int = SLOTS,
) -> Iterator[tuple[int, Completion]]:
    """Yield each prompt's index and completion as soon as the completion ends.

    A completion includes the stop token or text that ends it. seeds: one per prompt, needed with a
    temperature; apart from rounding, a completion depends on its own seed and not on the rest of the batch.
    slots: completions that are decoded at the same time.
    """
    stop = StopConditions(sampling, tokenizer, stops)
    seeds = seeds or [0] * len(prompts)
    # Sorting puts equal prompts and common prefixes next to each other, so one prefill computes them once.
    order = sorted(range(len(prompts)), key=lambda i: prompts[i])
    if prompts and support.supports_packing(model, prompts[0]):
        yield from _Batcher(model, stop, min(slots, len(prompts))).run(prompts, seeds, order)
        return
    for indices in _batches(model, prompts, slots):
        batch = [prompts[i] for i in indices]
        completions = _generate_padded(model, stop, batch, [seeds[i] for i in indices])
        yield from zip(indices, completions, strict=True)


@dataclass
class _Slot:
    """A completion that is being decoded."""

    item: int
    """Index of its prompt."""
    row: int
    """Its row of the KV cache."""
    position: int
    """Position at which its last token is fed to the model."""
    uniforms: list[float]
    """Uniform numbers in [0, 1) to sample by, one per token; empty for greedy decoding."""
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    """Of its tokens; empty for greedy decoding."""
    ended: bool = False
    """Terminated by a stop token or text, or at the length limit."""


class _Batcher:
    """Decodes a token per step in each active slot; the slot of an ended completion takes the next prompt.

    Each active slot owns one row of the KV cache, and `free` in `run` lists the rows that none owns. The
    cache holds a slot's prompt and all of its tokens but the last, which the next step feeds.
    """

    def __init__(self, model: PreTrainedModel, stop: StopConditions, slots: int) -> None:
        self.model, self.stop, self.slots = model, stop, slots
        self.cache = KVCache(slots)

    @torch.no_grad()
    def run(
        self, prompts: list[list[int]], seeds: list[int], order: list[int]
    ) -> Iterator[tuple[int, Completion]]:
        """Yield each prompt's index and completion; `order` is the order in which prompts get slots.

        Each iteration runs one forward pass, either a prefill of new prompts or a decode step of all active
        slots, samples one token for each slot that it computed, and retires the slots that have ended.
        """
        waiting, active, free = deque(order), list[_Slot](), list(range(self.slots))
        while waiting or active:
            # Prefill several prompts at a time: that computes their common prefix once.
            if waiting and (not active or len(free) >= FREE_SHARE * self.slots):
                items = [waiting.popleft() for _ in range(min(len(free), len(waiting)))]
                computed = [
                    _Slot(i, free.pop(), len(prompts[i]), _uniforms(self.stop.sampling, seeds[i]))
                    for i in items
                ]
                logits = self._prefill([prompts[i] for i in items], [slot.row for slot in computed])
                active += computed
            else:
                computed = active
                logits = self._decode(active)  # (slots computed, vocabulary), as from a prefill
            for slot, token in zip(computed, self._sample(logits, computed), strict=True):
                slot.ids.append(token)
                complete = self.stop.reached(slot.ids)
                slot.ended = complete or len(slot.ids) == self.stop.sampling.max_new_tokens
                if slot.ended:
                    free.append(slot.row)
                    yield slot.item, Completion(slot.ids, complete, slot.logprobs)
            active = [slot for slot in active if not slot.ended]
            # Attention computes every row of the cache. Once no prompt waits, free rows are never used again.
            if not waiting and active and len(active) <= (1 - FREE_SHARE) * self.cache.rows:
                self.cache.compact(self._tensor([slot.row for slot in active]))
                for row, slot in enumerate(active):
                    slot.row = row

    def _prefill(self, prompts: list[list[int]], rows: list[int]) -> Tensor:
        """Compute each distinct prompt once, and cache keys and values of the i-th prompt in row `rows[i]`.

        Returns the logits after each prompt: (prompts, vocabulary).
        """
        unique = [list(ids) for ids in dict.fromkeys(map(tuple, prompts))]
        index = {tuple(ids): i for i, ids in enumerate(unique)}
        batch = PackedBatch.from_prompts(unique, self.model.device)
        suffix_of = self._tensor([index[tuple(ids)] for ids in prompts])  # (prompts,)
        self.cache.reserve(max(map(len, unique)) + 1)  # one more for the first token of the completion
        layout = Prefill(batch, self.cache, suffix_of, self._tensor(rows))
        states = support.packed_hidden_states(self.model, batch.input_ids, batch.position_ids, layout)
        return self._logits(states[0, batch.target_positions()])[suffix_of]  # states: (1, tokens, width)

    def _decode(self, slots: list[_Slot]) -> Tensor:
        """Feed the last token of each slot to the model: logits (slots, vocabulary)."""
        positions = self._tensor([slot.position for slot in slots])
        self.cache.set_positions(self._tensor([slot.row for slot in slots]), positions)
        tokens = self._tensor([slot.ids[-1] for slot in slots])
        for slot in slots:
            slot.position += 1
        # The slots' tokens form one row of a packed batch: (1, slots).
        states = support.packed_hidden_states(self.model, tokens[None], positions[None], self.cache)
        return self._logits(states[0])

    def _logits(self, states: Tensor) -> Tensor:
        return self.model.get_output_embeddings()(states).float()  # type: ignore[no-any-return]

    def _sample(self, logits: Tensor, slots: list[_Slot]) -> list[int]:
        """Choose the next token of each slot from its row of `logits` (slots, vocabulary)."""
        sampling = self.stop.sampling
        if not sampling.temperature:
            return logits.argmax(-1).tolist()  # type: ignore[no-any-return]
        uniforms = [slot.uniforms[len(slot.ids)] for slot in slots]
        draws = torch.tensor(uniforms, dtype=torch.float64, device=logits.device)
        tokens, logprobs = sample_tokens(logits, sampling, draws)
        for slot, logprob in zip(slots, logprobs.tolist(), strict=True):
            slot.logprobs.append(logprob)
        return tokens.tolist()  # type: ignore[no-any-return]

    def _tensor(self, values: list[Any]) -> Tensor:
        return torch.tensor(values, device=self.model.device)


def _uniforms(sampling: Sampling, seed: int) -> list[float]:
    """Draw a number in [0, 1) for each token in advance, so that no completion depends on the others."""
    if not sampling.temperature:
        return []
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(sampling.max_new_tokens, generator=generator, dtype=torch.float64).tolist()  # type: ignore[no-any-return]


def sample_tokens(logits: Tensor, sampling: Sampling, draws: Tensor) -> tuple[Tensor, Tensor]:
    """Sample one token from each row of `logits` (rows, vocabulary) by inverse transform sampling.

    Returns the tokens and their log-probabilities in the distribution that is sampled from, (rows,) each.

    draws: a uniform number in [0, 1) for each row, in float64: float32 would round the largest up to 1, for
    which there is no token. The token is the first, in the order of the vocabulary, whose cumulative
    probability exceeds the row's number.
    """
    from transformers import TopKLogitsWarper

    logits = logits / sampling.temperature
    if 0 < sampling.top_k < logits.shape[-1]:
        logits = TopKLogitsWarper(sampling.top_k)(None, logits)
    # In float32 a sum near 1 would lose every token of a probability below 6e-8.
    probabilities = logits.softmax(-1)  # (rows, vocabulary)
    cumulative = probabilities.cumsum(-1, dtype=torch.float64)  # (rows, vocabulary)
    # The last sum may differ from 1 by rounding, so the draws are scaled to it. right=True skips tokens of
    # probability 0, also for a draw of 0.
    targets = draws.double()[:, None] * cumulative[:, -1:]
    tokens = torch.searchsorted(cumulative, targets, right=True)  # (rows, 1)
    # A finite draw stays below the last sum. NaN exceeds nothing, and its search ends past the vocabulary.
    tokens = tokens.clamp_(max=logits.shape[-1] - 1)
    return tokens[:, 0], probabilities.gather(1, tokens)[:, 0].log()


def _batches(model: Any, prompts: list[list[int]], size: int) -> Iterator[list[int]]:
    """Yield the indices of up to `size` prompts of similar length.

    A model with a trained prompt (see `support.is_prompt_learning`) must see no padding, so its batches have
    prompts of equal length.
    """
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    while order:
        length = len(prompts[order[0]])
        batch = [
            i for i in order[:size] if len(prompts[i]) == length or not support.is_prompt_learning(model)
        ]
        order = order[len(batch) :]
        yield batch


@torch.no_grad()
def _generate_padded(
    model: Any, stop: StopConditions, prompts: list[list[int]], seeds: list[int]
) -> list[Completion]:
    """Generate with transformers' `generate`, padded on the left."""
    sampling, pad = stop.sampling, stop.tokenizer.pad_token_id
    ids, mask = padded(prompts, pad, model.device)
    width = ids.shape[1]
    uniforms = torch.tensor([_uniforms(sampling, seed) for seed in seeds], dtype=torch.float64)
    logprobs: list[Tensor] = []  # of each step's tokens, (prompts,)

    def draw(input_ids: Tensor, scores: Tensor) -> Tensor:
        """Draw each row's next token, and leave `generate` no other: its own draws depend on the batch."""
        draws = uniforms[:, input_ids.shape[1] - width].to(scores.device)
        tokens, of_step = sample_tokens(scores, sampling, draws)  # (rows,) each
        logprobs.append(of_step)
        return torch.full_like(scores, -torch.inf).scatter(1, tokens[:, None], 0.0)

    def has_stop_text(input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        """True for rows whose completion has one; transformers' own criterion also matches the prompt."""
        return torch.tensor([stop.reached(row) for row in input_ids[:, width:].tolist()], device=ids.device)

    options: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    if sampling.temperature:
        options["logits_processor"] = [draw]
    if stop.texts:
        options["stopping_criteria"] = [has_stop_text]
    with _without_generation_config(model):
        rows = model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=sampling.max_new_tokens,
            eos_token_id=list(sampling.stop_ids),
            pad_token_id=pad,
            **options,
        )[:, width:]  # (prompts, new tokens)
    completions = []
    of_rows = torch.stack(logprobs, 1).tolist() if logprobs else [[]] * len(prompts)
    for row, values in zip(rows.tolist(), of_rows, strict=True):  # rows that end early are padded
        ends = (n for n in range(1, len(row) + 1) if stop.reached(row[:n]))
        length = next(ends, None)
        completions.append(Completion(row[:length], length is not None, values[:length]))
    return completions


@contextmanager
def _without_generation_config(model: Any) -> Iterator[None]:
    """Hide the model's generation_config.json inside the context, so that its penalties, say, have no effect.

    `generate` takes from that file what it is not passed, and no other way to generate here reads it.
    """
    from transformers import GenerationConfig

    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    saved, base.generation_config = base.generation_config, GenerationConfig()
    try:
        yield
    finally:
        base.generation_config = saved
