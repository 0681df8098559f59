"""Models in this process: choices and batched generation, for small models, evaluation and CPU rollouts."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

from stages.config import ServerSection
from stages.engines import (
    ChoiceRequest,
    ChoiceResult,
    Completion,
    EngineSpec,
    Failure,
    GenerateRequest,
    Sampling,
)
from stages.engines.continuous_batching import generate, padded
from stages.errors import ConfigError, MeaninglessError
from stages.models.base import load_merged
from stages.models.tokenizer import load_tokenizer
from stages.packing import support
from stages.packing.batch import PackedBatch, common_prefix_length
from stages.prompts.answers import THOUGHT
from stages.prompts.renderer import chat

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase

TOKENS = 8192
"""Tokens of a batch of choices, in one row without padding."""
BATCH = 16
"""Prompts of a batch of choices, where the architecture needs padding."""
WORTH_KEEPING = 32
"""Length in tokens from which such a batch keeps the beginning of its prompts."""
END = THOUGHT[1]
"""Added to a thought that did not end by itself."""
THOUGHTS = 4
"""Batches of thoughts after which choices are made, so that a kill loses no more of them."""
HEAD_ROWS = 2048
"""Rows of a head that are converted to float32 at a time, few enough to stay in the processor's cache.

For 16 prompts and SmolLM2's 49,152 rows this takes 20 ms on one core. Converting the whole head each time
takes 88 ms, and keeping a float32 copy of it (113 MB) takes 27 ms.
"""


@contextmanager
def open(served: EngineSpec, server: ServerSection, say: Callable[[str], None]) -> Iterator[InProcess]:
    say(f"loading {served.model.name} in this process")
    yield InProcess(
        load_merged(served.model, served.adapter), load_tokenizer(served.model), server.batch_size
    )


class InProcess:
    """A model and its tokenizer, as an engine."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int) -> None:
        self.model, self.tokenizer, self.batch_size = model, tokenizer, batch_size

    def choose(self, ballots: Iterable[ChoiceRequest]) -> Iterator[tuple[int, ChoiceResult | Failure]]:
        """One forward pass per batch; the words' probabilities are read at the first token that differs.

        Prompts with the same beginning (such as worked examples) follow each other, and each batch computes
        the beginning once. A voter that thinks writes its thought first; thoughts take long, so the choices
        of some are made before others think.
        """
        every = list(ballots)
        size = (
            THOUGHTS * self.batch_size
            if any(ballot.max_thinking_tokens for ballot in every)
            else max(1, len(every))
        )
        for at in range(0, len(every), size):
            for i, choice in self._chosen(every[at : at + size]):
                yield at + i, choice

    @torch.no_grad()
    def _chosen(self, ballots: list[ChoiceRequest]) -> Iterator[tuple[int, ChoiceResult | Failure]]:
        pairs = enumerate(self._prepared(ballots))
        prepared = sorted(((ids, words, i) for i, (ids, words) in pairs), key=lambda item: item[0])
        longest = getattr(self.model.config.get_text_config(), "max_position_embeddings", math.inf)
        too_long = [(i, len(ids)) for ids, _, i in prepared if len(ids) > longest]
        for i, length in too_long:
            yield i, Failure("too_long", f"{length} tokens, and the model has room for {longest}")
        prepared = [item for item in prepared if len(item[0]) <= longest]
        for size in batches([ids for ids, _, _ in prepared]):
            part, prepared = prepared[:size], prepared[size:]
            with float32_head(self.model):
                logits = self._last_logits([ids for ids, _, _ in part])  # (batch, vocabulary)
            rows = logits.float().softmax(-1)
            for row, (_, words, i) in zip(rows, part, strict=True):
                found = row[torch.tensor(words, device=row.device)]
                mass = float(found.sum())
                if not math.isfinite(mass):
                    raise MeaninglessError(
                        "the model's outputs are not numbers",
                        "try model.dtype=float32, or look at its weights",
                    )
                shares = tuple((found / mass).tolist()) if mass else (1 / len(words),) * len(words)
                yield i, ChoiceResult(shares, mass)

    def at_once(self, ballots: list[ChoiceRequest]) -> int:
        """How many of these, which do not think, one forward pass computes."""
        return max(batches(sorted(ids for ids, _ in self._prepared(ballots))))

    def generate(
        self, questions: list[GenerateRequest], sampling: Sampling
    ) -> Iterator[tuple[int, Completion]]:
        stops = tuple(dict.fromkeys(text for question in questions for text in question.stop))
        prompts, seeds = [question.ids for question in questions], [question.seed for question in questions]
        return generate(self.model, self.tokenizer, prompts, sampling, stops, seeds, self.batch_size)

    def _last_logits(self, prompts: list[list[int]]) -> torch.Tensor:
        """Logits after each prompt: (prompts, vocabulary)."""
        if not support.supports_packing(self.model, prompts[0]):
            return self._last_of_padded(prompts)
        row = PackedBatch.of_prompts(prompts, self.model.device)
        states = support.packed_hidden_states(self.model, row.input_ids, row.position_ids, row)[
            0, row.target_positions()
        ]
        return self.model.get_output_embeddings()(states)  # type: ignore[no-any-return]

    def _last_of_padded(self, prompts: list[list[int]]) -> torch.Tensor:
        """The same in padded batches, behind the cache of the common beginning if there is a long one."""
        size = 1 if support.is_prompt_learning(self.model) else BATCH
        shared = min(common_prefix_length(prompts), min(map(len, prompts)) - 1)
        shared = shared if size > 1 and len(prompts) > 1 and shared >= WORTH_KEEPING else 0
        cache = self._cache(prompts[0][:shared]) if shared else None
        found = []
        for at in range(0, len(prompts), size):
            part = [ids[shared:] for ids in prompts[at : at + size]]
            ids, mask = padded(part, 0, self.model.device)
            mask = torch.cat([mask.new_ones(len(part), shared), mask], 1)
            given: dict[str, Any] = {}
            if size > 1:
                given = {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(0)[:, shared:]}
            if cache is not None:
                given["past_key_values"] = copy.deepcopy(cache)
                given["past_key_values"].batch_repeat_interleave(len(part))
            found.append(self.model(input_ids=ids, logits_to_keep=1, **given).logits[:, -1])
        return torch.cat(found)

    def _cache(self, ids: list[int]) -> Cache:
        there = torch.tensor([ids], device=self.model.device)
        return self.model(input_ids=there, use_cache=True, logits_to_keep=1).past_key_values  # type: ignore[no-any-return]

    def _prepared(self, ballots: list[ChoiceRequest]) -> Iterator[tuple[list[int], list[int]]]:
        """For each ballot: the token ids up to where the words differ, and the words' ids there."""
        prompts = [choice_ids(self.tokenizer, ballot) for ballot in ballots]
        thinking = [i for i, ballot in enumerate(ballots) if ballot.max_thinking_tokens]
        if thinking:
            first = ballots[thinking[0]]
            sampling = Sampling(first.max_thinking_tokens, (self.tokenizer.eos_token_id,), first.temperature)
            asked, seeds = [prompts[i] for i in thinking], [ballots[i].seed for i in thinking]
            for j, answer in generate(
                self.model, self.tokenizer, asked, sampling, (END,), seeds, self.batch_size
            ):
                thought = self.tokenizer.decode(answer.ids, skip_special_tokens=True).partition(END)[0]
                closed = self.tokenizer(f"{thought}\n{END}\n\n", add_special_tokens=False)["input_ids"]
                prompts[thinking[j]] += closed
        tokens = {words: word_tokens(self.tokenizer, words) for words in {b.words for b in ballots}}
        for ballot, ids in zip(ballots, prompts, strict=True):
            before, words = tokens[ballot.words]
            yield ids + before, words


def choice_ids(tokenizer: PreTrainedTokenizerBase, ballot: ChoiceRequest) -> list[int]:
    """The tokens of a question; ConfigError if it is a chat and the tokenizer has no template."""
    if isinstance(ballot.text, str):
        return list(tokenizer(ballot.text)["input_ids"])
    if isinstance(ballot.text[0], int):
        return list(ballot.text)  # type: ignore[arg-type]
    if not tokenizer.chat_template:
        raise ConfigError(
            "the voter's tokenizer has no chat template",
            "choose a persona without chat: lorapar list personas",
        )
    text = chat(tokenizer, ballot.text)  # type: ignore[arg-type]
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def batches(prompts: list[list[int]]) -> Iterator[int]:
    """How many of the sorted prompts go into each batch: TOKENS, with their common beginning counted once.

    Where another beginning starts, a batch also ends if two batches have fewer tokens than one.
    """
    size = tokens = shared = cost = 0  # cost: tokens of the batch, with its beginning counted once
    for last, ids in zip([[], *prompts], prompts, strict=False):
        same = min(shared, common_prefix_length([last, ids])) if size else len(ids)
        new = tokens + len(ids) - size * same
        if size and new > min(TOKENS, cost + len(ids)):
            yield size
            size, tokens, same, new = 0, 0, len(ids), len(ids)
        size, tokens, shared, cost = size + 1, tokens + len(ids), same, new
    if size:
        yield size


@contextmanager
def float32_head(model: PreTrainedModel) -> Iterator[None]:
    """Inside, a head of 16 bits gives float32 logits; any other head gives what it always gives.

    bfloat16 resolves a logit between 16 and 32 only to 1/8, so most prompts would tie. The hidden state stays
    as it is; what the architecture then does to its logits (a scale, a cap) is computed in float32.
    """
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear) or head.weight.dtype not in (torch.bfloat16, torch.float16):
        yield
        return

    def forward(_: nn.Module, inputs: tuple[torch.Tensor], __: torch.Tensor) -> torch.Tensor:
        hidden = inputs[0].float()
        return torch.cat([F.linear(hidden, rows.float()) for rows in head.weight.split(HEAD_ROWS)], -1) + bias

    bias = 0.0 if head.bias is None else head.bias.float()
    hook = head.register_forward_hook(forward)
    try:
        yield
    finally:
        hook.remove()


def word_tokens(tokenizer: PreTrainedTokenizerBase, words: tuple[str, ...]) -> tuple[list[int], list[int]]:
    """The tokens that all words begin with, and for each word the next token.

    ConfigError unless these next tokens are all different.
    """
    tokens = [_continuing(tokenizer, word) for word in words]
    same = common_prefix_length(tokens)
    if same == min(map(len, tokens)) or len({ids[same] for ids in tokens}) < len(words):
        raise ConfigError(f"the words {words} do not differ in one token")
    return tokens[0][:same], [ids[same] for ids in tokens]


def _continuing(tokenizer: PreTrainedTokenizerBase, word: str) -> list[int]:
    """The tokens of a word that continues a text: some tokenizers put a space before whatever begins one."""
    alone: list[int] = tokenizer(word, add_special_tokens=False)["input_ids"]
    if not word[:1].isspace():
        return alone
    before, whole = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("x", f"x{word}"))
    return whole[len(before) :] if whole[: len(before)] == before else alone
