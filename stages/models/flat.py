"""Several sequences in one row: nothing is padded, and a beginning that they share is computed once.

All layers but attention treat every token alike, so they take the row as it is. Attention gets its sequences
back: each sees the beginning that it shares and itself, at the positions it would have alone.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from stages.language.prompts import IGNORED
from stages.models.head import Chosen, chosen

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)

KINDS = ("eager", "sdpa")
"""Implementations of attention beside which a layout may stand."""
MARK = "flat_"
"""Before the name of an implementation that can also take a layout."""
LONGEST = 512
"""Tokens on which the two are compared; the logits of a long sequence take much memory."""
TOLERANCE, TOLERANCE_16 = 1e-3, 0.1
"""Mean difference of log-probabilities, between two ways to compute them, in 32 and in 16 bits."""


@dataclass(frozen=True)
class Branch:
    """What follows a shared beginning."""

    ids: list[int]
    targets: list[int]
    """For each token of `ids` the token to predict after it, or IGNORED."""


@dataclass(frozen=True)
class Group:
    """Sequences with the same beginning, on whose own tokens nothing is to be predicted."""

    shared: list[int]
    branches: list[Branch]


class Layout(Protocol):
    """How attention finds the sequences in a row."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        """Attention over a row: query (1, heads, tokens, width), key and value with as many heads or fewer.

        Returns (1, tokens, heads, width).
        """


@dataclass(frozen=True)
class Flat:
    """Groups in one row: first all shared beginnings, then all branches."""

    input_ids: Tensor
    """(1, tokens)"""
    position_ids: Tensor
    """(1, tokens): a branch goes on where its beginning ends."""
    targets: Tensor
    """(1, tokens)"""
    heads: Cells | None
    """The beginnings in a rectangle; None if there are none."""
    branches: Cells
    owner: Tensor
    """(branches,): row in `heads`."""
    mask: Tensor | None
    """(branches, 1, longest branch, longest beginning + longest branch), True where a token may look."""

    @classmethod
    def of(cls, groups: Sequence[Group], device: torch.device) -> Flat:
        branches = [branch for group in groups for branch in group.branches]
        shared = [group.shared for group in groups]
        rows = [*shared, *(branch.ids for branch in branches)]
        begins = [len(group.shared) for group in groups for _ in group.branches]
        positions = [range(len(ids)) for ids in shared]
        positions += [range(begin, begin + len(b.ids)) for begin, b in zip(begins, branches, strict=True)]
        targets = [IGNORED] * sum(map(len, shared)) + [t for branch in branches for t in branch.targets]
        heads = Cells.of([len(ids) for ids in shared], 0, device) if any(shared) else None
        own = Cells.of([len(b.ids) for b in branches], sum(map(len, shared)), device)
        owner = [i for i, group in enumerate(groups) for _ in group.branches]

        def tensor(values: list[int]) -> Tensor:
            return torch.tensor(values, device=device)

        made = cls(
            input_ids=tensor([i for row in rows for i in row])[None],
            position_ids=tensor([i for row in positions for i in row])[None],
            targets=tensor(targets)[None],
            heads=heads,
            branches=own,
            owner=tensor(owner),
            mask=None,
        )
        return made if heads is None else replace(made, mask=made._mask(heads))

    @classmethod
    def of_prompts(cls, prompts: Sequence[list[int]], device: torch.device) -> Flat:
        """Prompts with one token to predict, after each; what they all begin with stands there once."""
        shared = min(common(prompts), min(map(len, prompts)) - 1)
        marks = [[IGNORED] * (len(ids) - shared - 1) + [0] for ids in prompts]
        branches = [Branch(ids[shared:], mark) for ids, mark in zip(prompts, marks, strict=True)]
        return cls.of([Group(prompts[0][:shared], branches)], device)

    def wanted(self) -> Tensor:
        """Places of the tokens that have a target."""
        return (self.targets[0] != IGNORED).nonzero()[:, 0]

    def _mask(self, heads: Cells) -> Tensor:
        """A branch sees all of its beginning, and of itself what is not later."""
        number, width = self.branches.index.shape
        before = heads.real[self.owner][:, None].expand(-1, width, -1)
        own = torch.ones(width, width, dtype=torch.bool, device=before.device).tril()
        return torch.cat([before, own.expand(number, -1, -1)], -1)[:, None]

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        q, k, v = (self.branches.rectangle(x) for x in (query, key, value))
        if self.heads is None:
            return self.branches.flatten(_causal(q, k, v, scale))[None]
        assert self.mask is not None
        first_q, first_k, first_v = (self.heads.rectangle(x) for x in (query, key, value))
        k, v = (torch.cat([x.index_select(0, self.owner), y], 2) for x, y in ((first_k, k), (first_v, v)))
        first = self.heads.flatten(_causal(first_q, first_k, first_v, scale))
        return torch.cat([first, self.branches.flatten(_masked(q, k, v, self.mask, scale))])[None]


@dataclass(frozen=True)
class Cells:
    """Where the sequences of a row stand in a rectangle (sequences, longest), filled from the left."""

    index: Tensor
    """(sequences, longest): place in the row; the row's first one where a sequence has ended."""
    real: Tensor
    """(sequences, longest): True for tokens."""
    places: Tensor
    """(tokens,): for each token in the order of the row its place in the flattened rectangle."""

    @classmethod
    def of(cls, lengths: list[int], first: int, device: torch.device) -> Cells:
        sizes = torch.tensor(lengths, device=device)
        column = torch.arange(int(sizes.max()), device=device)
        real = column < sizes[:, None]
        start = first + sizes.cumsum(0) - sizes
        index = torch.where(real, start[:, None] + column, first)
        return cls(index, real, real.flatten().nonzero()[:, 0])

    def rectangle(self, x: Tensor) -> Tensor:
        """(1, heads, tokens, width) → (sequences, heads, longest, width)"""
        found = x[0].index_select(1, self.index.flatten())
        return found.view(x.shape[1], *self.index.shape, x.shape[3]).transpose(0, 1)

    def spread(self, x: Tensor) -> Tensor:
        """(tokens, width) → (sequences, longest, width), zero where a sequence has ended."""
        made = x.new_zeros(self.real.numel(), x.shape[1]).index_copy_(0, self.places, x)
        return made.view(*self.real.shape, -1)

    def owners(self) -> Tensor:
        """(tokens,): the sequence of each token."""
        return self.places // self.real.shape[1]

    def flatten(self, x: Tensor) -> Tensor:
        """(sequences, heads, longest, width) → (tokens, heads, width)"""
        return x.transpose(1, 2).flatten(0, 1).index_select(0, self.places)


def _causal(query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
    """Each row by itself; what is behind its end is computed and not used."""
    grouped = query.shape[1] != key.shape[1]
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=grouped)


def _masked(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float | None) -> Tensor:
    """The heads that share a key stand one below the other, so that no key is repeated."""
    rows, heads, width, size = query.shape
    times = heads // key.shape[1]
    found = F.scaled_dot_product_attention(
        query.reshape(rows, key.shape[1], times * width, size),
        key,
        value,
        attn_mask=mask.repeat(1, 1, times, 1),
        scale=scale,
    )
    return found.view(rows, heads, width, size)


def _attention(usual: str) -> Any:
    """Attention as in a layout, or where none is given, as `usual`."""

    def attend(
        module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None,
        flat: Layout | None = None, scaling: float | None = None, **given: Any,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        if flat is None:
            own = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
            interface = ALL_ATTENTION_FUNCTIONS.get_interface(usual, own)
            return interface(module, query, key, value, mask, scaling=scaling, **given)  # type: ignore[no-any-return]
        return flat.attend(module.layer_idx, query, key, value, scaling), None

    return attend


for usual in KINDS:
    AttentionInterface.register(MARK + usual, _attention(usual))
    AttentionMaskInterface.register(MARK + usual, ALL_MASK_ATTENTION_FUNCTIONS[usual])


def unfit(model: PreTrainedModel) -> str | None:
    """Why the architecture cannot take rows, as far as its config says; else None."""
    config = model.config
    kind = config._attn_implementation.removeprefix(MARK)
    if kind not in KINDS:
        return f"attention is {kind}, not {' or '.join(KINDS)}"
    kinds = {*(getattr(config, "layer_types", None) or ["full_attention"])}
    if kinds != {"full_attention"}:
        return f"it has layers of {', '.join(sorted(kinds - {'full_attention'}))}"
    if getattr(config, "layer_types", None) is None and getattr(config, "sliding_window", None):
        return f"its layers see {config.sliding_window} tokens back"
    if not isinstance(model.get_output_embeddings(), nn.Linear):
        return "its head is no linear layer"
    return None


def fits(model: Any, ids: list[int]) -> bool:
    """Whether rows give the model's own numbers; if not, one warning says why. Asked once for each model.

    model: a plain model, or one in PEFT's wrapper. ids: a real sequence, on which both ways are compared. Its
    architecture then takes rows, see `hidden`; its own forward pass stays as it was, to the bit.
    """
    base = _plain(model)
    if base not in _fitting:
        prompt = "a trained prompt stands before every text" if has_prompt(model) else None
        reason = prompt or unfit(base) or _differs(model, base, ids)
        if reason:
            log.warning("%s computes every sequence by itself: %s", type(base).__name__, reason)
        _fitting[base] = reason is None
    return _fitting[base]


_fitting: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


@torch.no_grad()
def _differs(model: Any, base: PreTrainedModel, ids: list[int]) -> str | None:
    """What is wrong with a row of two equal branches; None if nothing is. Draws no random number."""
    ids = (ids * 4)[: min(max(4, len(ids)), LONGEST)]
    half = len(ids) // 2
    device = base.get_input_embeddings().weight.device
    branch = Branch(ids[half - 1 : -1], ids[half:])
    row = Flat.of([Group(ids[: half - 1], [branch, branch])], device)
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        logits = model(input_ids=torch.tensor([ids], device=device)).logits[0, half - 1 : -1]
        base.set_attn_implementation(MARK + base.config._attn_implementation.removeprefix(MARK))
        found = choose(model, row).log_probs.view(2, -1)
    except (RuntimeError, TypeError, ValueError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"
    finally:
        for module in training:
            module.training = True
    usual = logits.to(found.dtype).log_softmax(-1).gather(1, torch.tensor(ids[half:], device=device)[:, None])
    gap = float((found - usual[:, 0]).abs().mean())
    limit = TOLERANCE if logits.dtype.itemsize >= 4 else TOLERANCE_16
    return None if gap <= limit else f"log-probabilities in a row differ by {gap:.2g}"


def common(rows: Sequence[list[int]]) -> int:
    """Length of the beginning that all rows share."""
    first, last = min(rows), max(rows)  # in sorted order, these two differ the earliest
    return next(
        (i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last))
    )


def has_prompt(model: Any) -> bool:
    """Whether a trained prompt stands before every text.

    PEFT then ignores position ids, so padding would stand between the prompt and the text.
    """
    return hasattr(model, "get_base_model") and model.active_peft_config.is_prompt_learning


def _plain(model: Any) -> PreTrainedModel:
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[no-any-return]


def hidden(model: Any, input_ids: Tensor, position_ids: Tensor, layout: Layout) -> Tensor:
    """Last hidden states of a row: (1, tokens, width). The model must be one that `fits`.

    input_ids, position_ids: (1, tokens).
    """
    anything = torch.ones((1, 1, 1, 1), dtype=torch.bool, device=input_ids.device)
    return (
        _plain(model)
        .base_model(  # type: ignore[no-any-return]
            input_ids=input_ids,
            position_ids=position_ids,
            attention_mask=anything,  # with four dimensions the library makes none of its own
            use_cache=False,
            flat=layout,
        )
        .last_hidden_state
    )


def choose(model: Any, row: Flat, temperature: float = 1.0) -> Chosen:
    """What the model gives for the row's targets, in their order; without the head on any other token."""
    at = row.wanted()
    states = hidden(model, row.input_ids, row.position_ids, row)[0].index_select(0, at)
    return chosen(states, model.get_output_embeddings(), row.targets[0, at], temperature)
