"""Models in this process: choices and batched generation, for small models, evaluation and CPU rollouts."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

from stages.config import ServerSection
from stages.engines import Answer, Ballot, Choice, Failure, Question, Sampling, Served
from stages.errors import ConfigError
from stages.language.prompts import chat
from stages.models.base import load_merged
from stages.models.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase

BATCH = 16
END = "</think>"
"""The end of a thought; added if the thought did not end by itself."""
HEAD_ROWS = 2048
"""Rows of a head that are converted to float32 at a time, few enough to stay in the processor's cache.

For 16 prompts and SmolLM2's 49,152 rows this takes 20 ms on one core. Converting the whole head each time
takes 88 ms, and keeping a float32 copy of it (113 MB) takes 27 ms.
"""
WORTH_KEEPING = 32
"""Length in tokens from which it pays to compute a common beginning of prompts only once."""


@contextmanager
def open(served: Served, server: ServerSection, say: Callable[[str], None]) -> Iterator[InProcess]:
    say(f"loading {served.model.name} in this process")
    yield InProcess(
        load_merged(served.model, served.adapter), load_tokenizer(served.model), server.batch_size
    )


class InProcess:
    """A model and its tokenizer, as an engine."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int) -> None:
        self.model, self.tokenizer, self.batch_size = model, tokenizer, batch_size
        self._prefix: list[int] = []
        self._cache: Cache | None = None
        """Keys and values of `_prefix`, the beginning that the prompts of the last batch had in common."""

    @torch.no_grad()
    def choose(self, ballots: Iterable[Ballot]) -> Iterator[tuple[int, Choice | Failure]]:
        """One forward pass per batch; the words' probabilities are read at the first token that differs.

        Prompts with the same beginning (such as worked examples) follow each other, and the beginning is
        computed once. A voter that thinks writes its thought first.
        """
        pairs = enumerate(self._prepared(list(ballots)))
        prepared = sorted(((ids, words, i) for i, (ids, words) in pairs), key=lambda item: item[0])
        longest = self.model.config.max_position_embeddings
        too_long = [(i, len(ids)) for ids, _, i in prepared if len(ids) > longest]
        for i, length in too_long:
            yield i, Failure("too_long", f"{length} tokens, and the model has room for {longest}")
        prepared = [item for item in prepared if len(item[0]) <= longest]
        for at in range(0, len(prepared), BATCH):
            part = prepared[at : at + BATCH]
            with float32_head(self.model):
                logits = self._last_logits([ids for ids, _, _ in part])  # (batch, vocabulary)
            rows = logits.float().softmax(-1)
            for row, (_, words, i) in zip(rows, part, strict=True):
                found = row[torch.tensor(words, device=row.device)]
                mass = float(found.sum())
                shares = tuple((found / mass).tolist()) if mass else (1 / len(words),) * len(words)
                yield i, Choice(shares, mass)

    def generate(self, questions: list[Question], sampling: Sampling) -> Iterator[tuple[int, Answer]]:
        """Answers in batches of similar prompt length."""
        order = sorted(range(len(questions)), key=lambda i: len(questions[i].ids))
        for at in range(0, len(order), self.batch_size):
            part = [questions[i] for i in order[at : at + self.batch_size]]
            stops = tuple(dict.fromkeys(text for question in part for text in question.stop))
            if sampling.temperature:
                torch.manual_seed(part[0].seed)
            prompts = [question.ids for question in part]
            made = continuations(self.model, self.tokenizer, prompts, sampling, stops)
            yield from zip(order[at : at + self.batch_size], made, strict=True)

    def _last_logits(self, prompts: list[list[int]]) -> torch.Tensor:
        """Logits after each prompt: (prompts, vocabulary). Padding stands behind their common beginning."""
        if has_prompt(self.model):  # its keys and values take the cache's place
            return torch.cat(
                [self.model(input_ids=self._tensor([p]), logits_to_keep=1).logits[:, -1] for p in prompts]
            )
        shared = min(common(prompts), min(map(len, prompts)) - 1)
        kept = len(self._prefix) if all(p[: len(self._prefix)] == self._prefix for p in prompts) else 0
        if shared < WORTH_KEEPING:
            shared = 0
        elif 0 < kept <= shared < kept + WORTH_KEEPING:
            shared = kept
        else:
            self._prefix = prompts[0][:shared]
            self._cache = self.model(
                input_ids=self._tensor([self._prefix]), use_cache=True, logits_to_keep=1
            ).past_key_values
        width = max(map(len, prompts)) - shared
        ids = self._tensor([[0] * (width + shared - len(p)) + p[shared:] for p in prompts])
        mask = self._tensor(
            [[1] * shared + [0] * (width + shared - len(p)) + [1] * (len(p) - shared) for p in prompts]
        )
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, shared:]
        cache = None
        if shared:
            cache = copy.deepcopy(self._cache)
            assert cache is not None
            cache.batch_repeat_interleave(len(prompts))
        made = self.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            logits_to_keep=1,
        )
        return made.logits[:, -1]  # type: ignore[no-any-return]

    def _tensor(self, rows: list[list[int]]) -> torch.Tensor:
        return torch.tensor(rows, device=self.model.device)

    def _prepared(self, ballots: list[Ballot]) -> Iterator[tuple[list[int], list[int]]]:
        """For each ballot: the token ids up to where the words differ, and the words' ids there."""
        prompts = [self._ids(ballot) for ballot in ballots]
        thinking = [i for i, ballot in enumerate(ballots) if ballot.thought]
        for at in range(0, len(thinking), self.batch_size):
            part = thinking[at : at + self.batch_size]
            first = ballots[part[0]]
            sampling = Sampling(first.thought, (self.tokenizer.eos_token_id,), first.temperature)
            if first.temperature:
                torch.manual_seed(first.seed)
            answers = continuations(self.model, self.tokenizer, [prompts[i] for i in part], sampling, (END,))
            for i, answer in zip(part, answers, strict=True):
                thought = self.tokenizer.decode(answer.ids, skip_special_tokens=True).partition(END)[0]
                prompts[i] += self.tokenizer(f"{thought}\n{END}\n\n", add_special_tokens=False)["input_ids"]
        for ballot, ids in zip(ballots, prompts, strict=True):
            before, words = word_tokens(self.tokenizer, ballot.words)
            yield ids + before, words

    def _ids(self, ballot: Ballot) -> list[int]:
        if isinstance(ballot.text, str):
            return list(self.tokenizer(ballot.text)["input_ids"])
        if isinstance(ballot.text[0], int):
            return list(ballot.text)  # type: ignore[arg-type]
        if not self.tokenizer.chat_template:
            raise ConfigError(
                "the voter's tokenizer has no chat template",
                "choose a persona without chat: lorapar list personas",
            )
        text = chat(self.tokenizer, ballot.text)  # type: ignore[arg-type]
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])


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
    tokens = [tokenizer(word, add_special_tokens=False)["input_ids"] for word in words]
    same = common(tokens)
    if same == min(map(len, tokens)) or len({ids[same] for ids in tokens}) < len(words):
        raise ConfigError(f"the words {words} do not differ in one token")
    return tokens[0][:same], [ids[same] for ids in tokens]


def common(rows: list[list[int]]) -> int:
    """Length of the beginning that all rows share."""
    first, last = min(rows), max(rows)  # in sorted order, these two differ the earliest
    return next(
        (i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last))
    )


def has_prompt(model: Any) -> bool:
    """Whether a trained prompt stands before every text.

    PEFT then ignores position ids, so padding would stand between the prompt and the text.
    """
    return hasattr(model, "peft_config") and model.active_peft_config.is_prompt_learning


@torch.no_grad()
def continuations(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    sampling: Sampling,
    stops: tuple[str, ...] = (),
) -> list[Answer]:
    """What the model writes after each prompt, up to the first stop token or text, which is included.

    All prompts run as one batch, padded on the left. With a trained prompt, each length is a separate batch.
    """
    if has_prompt(model) and len(lengths := {len(prompt) for prompt in prompts}) > 1:
        made: dict[int, Answer] = {}
        for length in sorted(lengths):
            rows = [i for i, prompt in enumerate(prompts) if len(prompt) == length]
            answers = continuations(model, tokenizer, [prompts[i] for i in rows], sampling, stops)
            made.update(zip(rows, answers, strict=True))
        return [made[i] for i in range(len(prompts))]
    pad = tokenizer.pad_token_id
    width = max(map(len, prompts))
    ids = torch.full((len(prompts), width), pad)
    mask = torch.zeros_like(ids)
    for i, prompt in enumerate(prompts):
        ids[i, width - len(prompt) :], mask[i, width - len(prompt) :] = torch.tensor(prompt), 1
    how: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    if sampling.temperature:
        drawn = {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k}
        how = {"do_sample": True, **drawn}
    if stops:
        how["stopping_criteria"] = [_AtText(tokenizer, stops, width)]
    written = model.generate(
        input_ids=ids.to(model.device),
        attention_mask=mask.to(model.device),
        max_new_tokens=sampling.max_new_tokens,
        eos_token_id=list(sampling.stop_ids),
        pad_token_id=pad,
        **how,
    )[:, width:]
    return [_answer(row, tokenizer, sampling, stops) for row in written.tolist()]


class _AtText:
    """Ends a row once it has generated one of the texts; the library's criterion also matches the prompt."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, stops: tuple[str, ...], prompt_tokens: int
    ) -> None:
        self.tokenizer, self.stops, self.start = tokenizer, stops, prompt_tokens
        self.window = max(len(stop.encode()) for stop in stops) + 4  # a token is at least one byte

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        new = input_ids[:, max(self.start, input_ids.shape[1] - self.window) :].tolist()
        ended = [any(stop in text for stop in self.stops) for text in self.tokenizer.batch_decode(new)]
        return torch.tensor(ended, device=input_ids.device)


def _answer(
    ids: list[int], tokenizer: PreTrainedTokenizerBase, sampling: Sampling, stops: tuple[str, ...]
) -> Answer:
    """The answer in a row, up to its end: rows that end before others are padded."""
    ends = [ids.index(stop) for stop in sampling.stop_ids if stop in ids]
    if ends:
        return Answer(ids[: min(ends) + 1], True)
    while stops and ids and ids[-1] == tokenizer.pad_token_id:
        ids = ids[:-1]
    text = tokenizer.decode(ids) if stops else ""
    return Answer(ids, len(ids) < sampling.max_new_tokens or any(stop in text for stop in stops))
