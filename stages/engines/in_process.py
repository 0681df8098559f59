"""Models in this process: choices and batched generation, for small models, evaluation and CPU rollouts."""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from stages.config import PromptSection, ServerSection
from stages.engines import (
    ChoiceRequest,
    ChoiceResult,
    Completion,
    EngineSpec,
    Failure,
    GenerateRequest,
    Sampling,
)
from stages.engines.continuous_batching import generate
from stages.errors import ConfigError, UnusableResult
from stages.models.base import load_merged
from stages.models.load_errors import max_positions
from stages.models.tokenizer import load_tokenizer
from stages.packing import support
from stages.packing.batch import PackedBatch, common_prefix_length, padded
from stages.prompts.chat_template import chat, ids_to_continue, thinking_switch, tokenise
from stages.prompts.renderer import Renderer
from stages.prompts.thoughts import closing_of, opened

BATCH_TOKENS = 8192
"""Most tokens in a packed batch of choices."""
MOST_CELLS = 2 * BATCH_TOKENS
"""Most tokens of a batch after its common prefix, with padding."""
PADDED_BATCH = 16
"""Prompts in a batch of choices where the architecture needs padding."""
THINKING_BATCHES = 4
"""Choices are made after this many batches of thinking, so that a kill loses no more of them."""
HEAD_ROWS = 2048
"""Rows of a head that are converted to float32 at a time, few enough to stay in the processor's cache.

For 16 prompts and SmolLM2's 49,152 rows this takes 20 ms on one core. Converting the whole head each time
takes 88 ms, and keeping a float32 copy of it (113 MB) takes 27 ms.
"""


@contextmanager
def open_engine(spec: EngineSpec, server: ServerSection, say: Callable[[str], None]) -> Iterator["InProcess"]:
    say(f"loading {spec.model.name} in this process")
    yield InProcess(load_merged(spec.model, spec.adapter), load_tokenizer(spec.model), server.batch_size)


class InProcess:
    """A model and its tokenizer, as an engine."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int) -> None:
        self.model, self.tokenizer, self.batch_size = model, tokenizer, batch_size

    def choose_words(self, requests: Iterable[ChoiceRequest]) -> Iterator[tuple[int, ChoiceResult | Failure]]:
        """Yield each request's index and choice, read at the first token in which the words differ.

        One forward pass computes a batch. Prompts are sorted, so that those with a common prefix (worked
        examples, say) share a batch, which computes the prefix once. With `max_thinking_tokens` the model
        writes its thinking first. That takes long, so choices are made for one chunk of requests at a time.
        """
        pending = list(requests)
        thinks = any(request.max_thinking_tokens for request in pending)
        chunk = THINKING_BATCHES * self.batch_size if thinks else max(1, len(pending))
        for start in range(0, len(pending), chunk):
            for i, choice in self._choose_chunk(pending[start : start + chunk]):
                yield start + i, choice

    @torch.no_grad()
    def _choose_chunk(self, requests: list[ChoiceRequest]) -> Iterator[tuple[int, ChoiceResult | Failure]]:
        longest = max_positions(self.model.config) or math.inf
        tokens = {words: word_tokens(self.tokenizer, words) for words in {r.words for r in requests}}
        readable = {}  # index of the request → token ids of its prompt
        for i, request in enumerate(requests):
            ids = choice_ids(self.tokenizer, request)
            length = len(ids) + request.max_thinking_tokens + len(tokens[request.words][0])
            if length <= longest:
                readable[i] = ids
                continue
            thought = " with its thought" if request.max_thinking_tokens else ""
            yield i, Failure("too_long", f"{length} tokens{thought}, and the model has room for {longest}")
        self._append_thoughts(requests, readable)
        prompts = []  # token ids up to where the words differ, each word's token there, index of the request
        for i, ids in readable.items():
            common, distinct = tokens[requests[i].words]
            prompts.append((ids + common, distinct, i))
        prompts.sort(key=lambda prompt: prompt[0])  # as `batch_sizes` needs them
        for size in batch_sizes([ids for ids, _, _ in prompts]):
            batch, prompts = prompts[:size], prompts[size:]
            with float32_head(self.model):
                logits = self._last_logits([ids for ids, _, _ in batch])  # (batch, vocabulary)
            next_token = logits.float().softmax(-1)
            for distribution, (_, words, i) in zip(next_token, batch, strict=True):
                masses = distribution[torch.tensor(words, device=distribution.device)]  # (words,)
                mass = float(masses.sum())
                if not math.isfinite(mass):
                    raise UnusableResult(
                        "the model's outputs are not numbers",
                        "try model.dtype=float32, or look at its weights",
                    )
                # Relative to the other words; even if all of them underflow to 0.
                probabilities = tuple((masses / mass).tolist()) if mass else (1 / len(words),) * len(words)
                yield i, ChoiceResult(probabilities)

    def generate(
        self, requests: list[GenerateRequest], sampling: Sampling
    ) -> Iterator[tuple[int, Completion]]:
        """Yield each request's index and completion; the stop texts of any request end all completions."""
        stops = tuple(dict.fromkeys(text for request in requests for text in request.stop))
        prompts, seeds = [request.ids for request in requests], [request.seed for request in requests]
        return generate(self.model, self.tokenizer, prompts, sampling, stops, seeds, self.batch_size)

    def _last_logits(self, prompts: list[list[int]]) -> torch.Tensor:
        """Compute the logits after each prompt: (prompts, vocabulary)."""
        if not support.supports_packing(self.model, prompts[0]):
            return self._last_logits_padded(prompts)
        batch = PackedBatch.from_prompts(prompts, self.model.device)
        states = support.packed_hidden_states(self.model, batch.input_ids, batch.position_ids, batch)[
            0, batch.target_positions()
        ]  # (prompts, width)
        return self.model.get_output_embeddings()(states)  # type: ignore[no-any-return]

    def _last_logits_padded(self, prompts: list[list[int]]) -> torch.Tensor:
        # A trained prompt allows no padding: then each prompt is a batch, without mask and positions.
        size = 1 if support.is_prompt_learning(self.model) else PADDED_BATCH
        logits = []
        for start in range(0, len(prompts), size):
            ids, mask = padded(prompts[start : start + size], 0, self.model.device)  # (batch, longest)
            inputs: dict[str, Any] = {}
            if size > 1:
                # Positions count real tokens only.
                inputs = {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(0)}
            logits.append(self.model(input_ids=ids, logits_to_keep=1, **inputs).logits[:, -1])
        return torch.cat(logits)

    def _append_thoughts(self, requests: list[ChoiceRequest], prompts: dict[int, list[int]]) -> None:
        """Append to the prompts, by index of the request, the thinking of those that ask for some."""
        thinking = [i for i in prompts if requests[i].max_thinking_tokens]
        if not thinking:
            return
        # The requests of a voter have the same template, length limit and temperature.
        first, tokenizer = requests[thinking[0]], self.tokenizer
        section = PromptSection(chat_template_kwargs=template_arguments(tokenizer, thinks=True))
        renderer = Renderer(tokenizer, section)
        marks = renderer.marks
        sampling = Sampling(first.max_thinking_tokens, tuple(renderer.stop_ids), first.temperature)
        to_continue, seeds = [prompts[i] for i in thinking], [requests[i].seed for i in thinking]
        for j, completion in generate(
            self.model, tokenizer, to_continue, sampling, (marks.end,), seeds, self.batch_size
        ):
            text = tokenizer.decode([token for token in completion.ids if token not in renderer.stop_ids])
            closed = text.partition(marks.end)[0].rstrip() + marks.closing
            prompts[thinking[j]] += tokenizer(closed, add_special_tokens=False)["input_ids"]


def choice_ids(tokenizer: PreTrainedTokenizerBase, request: ChoiceRequest) -> list[int]:
    """Tokenize the text of a request; ConfigError if it is a chat and the tokenizer has no template."""
    if isinstance(request.text, str):
        return ids_to_continue(tokenizer, request.text)
    if isinstance(request.text[0], int):
        return list(request.text)  # type: ignore[arg-type]
    if not tokenizer.chat_template:
        raise ConfigError(
            "the voter's tokenizer has no chat template",
            "choose a persona without chat: lorapar list personas",
        )
    messages: list[dict[str, str]] = request.text  # type: ignore[assignment]
    arguments = template_arguments(tokenizer, request.max_thinking_tokens > 0)
    try:
        text = chat(tokenizer, messages, **arguments)
    except ConfigError:  # many templates have no system role: the user says it
        if messages[0]["role"] != "system":
            raise
        system, user, *later = messages
        messages = [user | {"content": f"{system['content']}\n\n{user['content']}"}, *later]
        text = chat(tokenizer, messages, **arguments)
    if not request.max_thinking_tokens:  # the vote is read where an answer stands, not where a thought begins
        answer = {"role": "assistant", "content": "@@"}
        lead, mark, _ = chat(tokenizer, [*messages, answer], False, **arguments).partition("@@")
        if mark and lead.startswith(text):
            text = lead
        elif tag := opened(text):
            text += f"\n{closing_of(tag.rstrip())}\n\n"
    return tokenise(tokenizer, text)


def template_arguments(tokenizer: PreTrainedTokenizerBase, thinks: bool) -> dict[str, Any]:
    """Return the arguments of the chat template for a thought or none; no arguments if it has no switch."""
    return (thinking_switch(tokenizer) or ({}, {}))[thinks]


def batch_sizes(prompts: list[list[int]]) -> Iterator[int]:
    """Yield the number of prompts in each packed batch, in the order of the sorted prompts.

    A batch computes its common prefix once. Of n prompts with `total` tokens it costs
    total - (n - 1) · prefix tokens. A prompt joins the batch unless the batch would then cost more than
    BATCH_TOKENS, or more than without the prompt plus the prompt alone (where another prefix starts), or fill
    a rectangle of more than MOST_CELLS, in which attention pads what follows the prefix to one length.
    """
    n = total = prefix = cost = longest = 0
    for previous, ids in zip([[], *prompts], prompts, strict=False):
        # In sorted order no prompt of the batch shares more with `ids` than the previous one does, so the
        # prefix of all is the shorter of the two. Of a prompt alone, all is prefix.
        joint_prefix = min(prefix, common_prefix_length([previous, ids])) if n else len(ids)
        joint_cost = total + len(ids) - n * joint_prefix  # of n + 1 prompts
        cells = (n + 1) * (max(longest, len(ids)) - joint_prefix)
        if n and (joint_cost > min(BATCH_TOKENS, cost + len(ids)) or cells > MOST_CELLS):
            yield n
            n, total, longest, joint_prefix, joint_cost = 0, 0, 0, len(ids), len(ids)  # the next batch
        n, total, prefix, cost = n + 1, total + len(ids), joint_prefix, joint_cost
        longest = max(longest, len(ids))
    if n:
        yield n


@contextmanager
def float32_head(model: PreTrainedModel) -> Iterator[None]:
    """Compute logits in float32 inside the context if the head has 16 bits; any other head stays as it is.

    bfloat16 resolves a logit between 16 and 32 only to 1/8, so most prompts would tie. The hidden state stays
    as it is; what the architecture then does to its logits (a scale, a cap) is computed in float32.
    """
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear) or head.weight.dtype not in (torch.bfloat16, torch.float16):
        yield
        return
    bias = 0.0 if head.bias is None else head.bias.float()

    def replace_logits(_: nn.Module, inputs: tuple[torch.Tensor], __: torch.Tensor) -> torch.Tensor:
        hidden = inputs[0].float()
        # Matrix product of each chunk of the vocabulary, side by side: (…, vocabulary).
        return torch.cat([F.linear(hidden, rows.float()) for rows in head.weight.split(HEAD_ROWS)], -1) + bias

    hook = head.register_forward_hook(replace_logits)
    try:
        yield
    finally:
        hook.remove()


def word_tokens(tokenizer: PreTrainedTokenizerBase, words: tuple[str, ...]) -> tuple[list[int], list[int]]:
    """Split the words' tokens into those that all words begin with, and the next token of each word.

    ConfigError unless these next tokens are all different.
    """
    tokens = [_tokens_in_text(tokenizer, word) for word in words]
    common = common_prefix_length(tokens)
    if common == min(map(len, tokens)) or len({ids[common] for ids in tokens}) < len(words):
        raise ConfigError(f"the words {words} do not differ in one token")
    return tokens[0][:common], [ids[common] for ids in tokens]


def _tokens_in_text(tokenizer: PreTrainedTokenizerBase, word: str) -> list[int]:
    """Tokenize a word as it continues a text: some tokenizers put a space before whatever begins one."""
    alone: list[int] = tokenizer(word, add_special_tokens=False)["input_ids"]
    if not word[:1].isspace():
        return alone
    # Tokenize the word behind a letter, and take the letter's tokens away.
    letter, joined = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("x", f"x{word}"))
    return joined[len(letter) :] if joined[: len(letter)] == letter else alone
