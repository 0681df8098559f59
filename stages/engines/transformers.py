"""Models in this process: choices for small voters, and batched generation for eval and for rollouts on CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from stages.config import ClassifySection, ModelSection, Voter
from stages.engines import Ballot, Choice
from stages.errors import ConfigError
from stages.language.prompts import Row, chat, collate, load_tokenizer
from stages.lora.adapter import load_base

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from stages.language.prompts import Renderer

BATCH = 16


@contextmanager
def open(model: ModelSection, voter: Voter, settings: ClassifySection, say: Callable[[str], None]) -> Iterator[_Chooser]:
    say(f"loading {model.name} in this process")
    yield _Chooser(load_base(model), load_tokenizer(model))


class _Chooser:
    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self.model, self.tokenizer = model, tokenizer

    @torch.no_grad()
    def choose(self, ballots: list[Ballot]) -> Iterator[tuple[int, Choice]]:
        """One forward pass per batch; the words' probabilities are read at the first token in which they differ."""
        prepared = sorted(((i, *self._prepare(ballot)) for i, ballot in enumerate(ballots)), key=lambda item: len(item[1]))
        for at in range(0, len(prepared), BATCH):
            part = prepared[at : at + BATCH]
            batch = collate([Row(str(i), ids, ids) for i, ids, _ in part], self.tokenizer.pad_token_id or 0, self.model.device)
            last = batch.attention_mask.sum(1) - 1
            logits = self.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
            probabilities = logits[torch.arange(len(part)), last].float().softmax(-1)  # (batch, vocabulary)
            for row, (i, _, pair) in zip(probabilities, part, strict=True):
                one, two = float(row[pair[0]]), float(row[pair[1]])
                yield i, Choice(two / (one + two) if one + two else 0.5, one + two)

    def _prepare(self, ballot: Ballot) -> tuple[list[int], tuple[int, int]]:
        """Token ids up to where the two words differ, and the two ids there."""
        if isinstance(ballot.text, str):
            ids = self.tokenizer(ballot.text)["input_ids"]
        elif not self.tokenizer.chat_template:
            raise ConfigError(
                "the voter's tokenizer has no chat template", "choose a persona without chat: lorapar list personas"
            )
        else:
            ids = self.tokenizer(chat(self.tokenizer, ballot.text), add_special_tokens=False)["input_ids"]
        one, two = (self.tokenizer(word, add_special_tokens=False)["input_ids"] for word in ballot.words)
        for n, (a, b) in enumerate(zip(one, two, strict=False)):
            if a != b:
                return [*ids, *one[:n]], (a, b)
        raise ConfigError(f"label words {ballot.words} do not differ in any token")


@torch.no_grad()
def continuations(
    model: PreTrainedModel, prompts: list[list[int]], renderer: Renderer, longest: int, sampling: dict[str, Any]
) -> list[list[int]]:
    """Token ids that the model writes after each prompt, up to and with the first stop token.

    All prompts run as one batch, padded on the left; `sampling` goes to `generate`.
    """
    pad = renderer.tokenizer.pad_token_id
    width = max(map(len, prompts))
    ids = torch.full((len(prompts), width), pad)
    mask = torch.zeros_like(ids)
    for i, prompt in enumerate(prompts):
        ids[i, width - len(prompt) :], mask[i, width - len(prompt) :] = torch.tensor(prompt), 1
    made = model.generate(
        input_ids=ids.to(model.device),
        attention_mask=mask.to(model.device),
        max_new_tokens=longest,
        eos_token_id=renderer.stop_ids,
        pad_token_id=pad,
        **sampling,
    )[:, width:]
    return [_until_stop(row, renderer.stop_ids) for row in made.tolist()]


def _until_stop(ids: list[int], stops: list[int]) -> list[int]:
    ends = [ids.index(stop) for stop in stops if stop in ids]
    return ids[: min(ends) + 1] if ends else ids
