"""Several sequences in one row: nothing is padded, and a beginning that they share stands there once.

All layers but attention treat every token alike, so they take the row as it is. Attention gets its sequences
back: each sees the beginning that it shares and itself, at the positions it would have alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from stages.prompts.renderer import IGNORED


@dataclass(frozen=True)
class Suffix:
    """What follows a shared beginning."""

    ids: list[int]
    targets: list[int]
    """For each token of `ids` the token to predict after it, or IGNORED."""


@dataclass(frozen=True)
class PrefixGroup:
    """Sequences with the same beginning, on whose own tokens nothing is to be predicted."""

    prefix: list[int]
    suffixes: list[Suffix]


@dataclass(frozen=True)
class AttentionArgs:
    """What a layer says of its attention."""

    scale: float | None
    """Factor of the products of query and key; None: one over the root of their width."""
    dropout: float = 0.0


class AttentionLayout(Protocol):
    """How attention finds the sequences in a row."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, how: AttentionArgs) -> Tensor:
        """Attention over a row: query (1, heads, tokens, width), key and value with as many heads or fewer.

        Returns (1, tokens, heads, width).
        """


@dataclass(frozen=True)
class PackedBatch:
    """Groups in one row: first all shared beginnings, then all branches."""

    input_ids: Tensor
    """(1, tokens)"""
    position_ids: Tensor
    """(1, tokens): a branch goes on where its beginning ends."""
    targets: Tensor
    """(1, tokens)"""
    prefixes: RaggedIndex | None
    """The beginnings in a rectangle; None if there are none."""
    suffixes: RaggedIndex
    prefix_of: Tensor
    """(branches,): row in `heads`."""

    @classmethod
    def of(cls, groups: Sequence[PrefixGroup], device: torch.device) -> PackedBatch:
        branches = [branch for group in groups for branch in group.suffixes]
        shared = [group.prefix for group in groups]
        rows = [*shared, *(branch.ids for branch in branches)]
        begins = [len(group.prefix) for group in groups for _ in group.suffixes]
        positions = [range(len(ids)) for ids in shared]
        positions += [range(begin, begin + len(b.ids)) for begin, b in zip(begins, branches, strict=True)]
        targets = [IGNORED] * sum(map(len, shared)) + [t for branch in branches for t in branch.targets]
        heads = RaggedIndex.of([len(ids) for ids in shared], 0, device) if any(shared) else None
        own = RaggedIndex.of([len(b.ids) for b in branches], sum(map(len, shared)), device)
        owner = [i for i, group in enumerate(groups) for _ in group.suffixes]

        def tensor(values: list[int]) -> Tensor:
            return torch.tensor(values, device=device)

        return cls(
            input_ids=tensor([i for row in rows for i in row])[None],
            position_ids=tensor([i for row in positions for i in row])[None],
            targets=tensor(targets)[None],
            prefixes=heads,
            suffixes=own,
            prefix_of=tensor(owner),
        )

    @classmethod
    def of_prompts(cls, prompts: Sequence[list[int]], device: torch.device) -> PackedBatch:
        """Prompts with one token to predict, after each; what they all begin with stands there once."""
        shared = min(common_prefix_length(prompts), min(map(len, prompts)) - 1)
        marks = [[IGNORED] * (len(ids) - shared - 1) + [0] for ids in prompts]
        branches = [Suffix(ids[shared:], mark) for ids, mark in zip(prompts, marks, strict=True)]
        return cls.of([PrefixGroup(prompts[0][:shared], branches)], device)

    def target_positions(self) -> Tensor:
        """Places of the tokens that have a target."""
        return (self.targets[0] != IGNORED).nonzero()[:, 0]

    @cached_property
    def mask(self) -> Tensor:
        """(branches, 1, longest branch, longest beginning + longest branch), True where a token may look.

        A branch sees all of its beginning, and of itself what is not later.
        """
        assert self.prefixes is not None
        number, width = self.suffixes.index.shape
        before = self.prefixes.real[self.prefix_of][:, None].expand(-1, width, -1)
        own = torch.ones(width, width, dtype=torch.bool, device=before.device).tril()
        return torch.cat([before, own.expand(number, -1, -1)], -1)[:, None]

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, how: AttentionArgs) -> Tensor:
        q, k, v = (self.suffixes.rectangle(x) for x in (query, key, value))
        if self.prefixes is None:
            return self.suffixes.flatten(_causal(q, k, v, how))[None]
        first_q, first_k, first_v = (self.prefixes.rectangle(x) for x in (query, key, value))
        k, v = (torch.cat([x.index_select(0, self.prefix_of), y], 2) for x, y in ((first_k, k), (first_v, v)))
        first = self.prefixes.flatten(_causal(first_q, first_k, first_v, how))
        return torch.cat([first, self.suffixes.flatten(_masked(q, k, v, self.mask, how))])[None]


@dataclass(frozen=True)
class RaggedIndex:
    """Where the sequences of a row stand in a rectangle (sequences, longest), filled from the left."""

    index: Tensor
    """(sequences, longest): place in the row; the row's first one where a sequence has ended."""
    real: Tensor
    """(sequences, longest): True for tokens."""
    places: Tensor
    """(tokens,): for each token in the order of the row its place in the flattened rectangle."""

    @classmethod
    def of(cls, lengths: list[int], first: int, device: torch.device) -> RaggedIndex:
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

    def sequence_of(self) -> Tensor:
        """(tokens,): the sequence of each token."""
        return self.places // self.real.shape[1]

    def flatten(self, x: Tensor) -> Tensor:
        """(sequences, heads, longest, width) → (tokens, heads, width)"""
        return x.transpose(1, 2).flatten(0, 1).index_select(0, self.places)


def _causal(query: Tensor, key: Tensor, value: Tensor, how: AttentionArgs) -> Tensor:
    """Each row by itself; what is behind its end is computed and not used."""
    grouped = query.shape[1] != key.shape[1]
    return F.scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=how.scale, dropout_p=how.dropout, enable_gqa=grouped
    )


def _masked(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, how: AttentionArgs) -> Tensor:
    """The heads that share a key stand one below the other, so that no key is repeated."""
    rows, heads, width, size = query.shape
    times = heads // key.shape[1]
    found = F.scaled_dot_product_attention(
        query.reshape(rows, key.shape[1], times * width, size),
        key,
        value,
        attn_mask=mask.repeat(1, 1, times, 1),
        scale=how.scale,
        dropout_p=how.dropout,
    )
    return found.view(rows, heads, width, size)


def common_prefix_length(rows: Sequence[list[int]]) -> int:
    """Length of the beginning that all rows share."""
    first, last = min(rows), max(rows)  # in sorted order, these two differ the earliest
    return next(
        (i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last))
    )
