"""Packed batch: several sequences in one row without padding, in which a prefix that they share stands once.

All layers but attention treat every token alike, so they take the row as it is. Attention needs the sequences
back: each sees the prefix that it shares and itself, at the positions that it would have alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from stages.prompts.renderer import IGNORED

ALIGNMENT = 8
"""Row stride of a mask, in elements, is a multiple of this: CUDA's attention would pad a copy of others."""
SHORT = 256
"""Up to so many keys a CPU's products in float32 are faster than its attention in bfloat16."""


@dataclass(frozen=True)
class Suffix:
    """The tokens of one sequence after the prefix that it shares with others."""

    ids: list[int]
    targets: list[int]
    """For each token of `ids` the token to predict after it, or IGNORED."""


@dataclass(frozen=True)
class PrefixGroup:
    """Sequences with the same prefix; no token of the prefix has a target."""

    prefix: list[int]
    suffixes: list[Suffix]


class AttentionLayout(Protocol):
    """Attention over a row of several sequences."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, **args: Any) -> Tensor:
        """Compute attention of one layer; args: `scale` and `dropout_p` of torch's attention.

        query: (1, heads, tokens, width). key, value: (1, key heads, tokens, width), where `key heads` divides
        `heads`. Returns (1, tokens, heads, width).
        """


@dataclass(frozen=True)
class PackedBatch:
    """Groups of sequences in one row: first the prefixes of all groups, then all suffixes.

    Two groups, of the prefix P with the suffixes A and B and of the prefix Q with the suffix C, are the row
    P Q A B C. Its attention computes P and Q by themselves, then A after P, B after P and C after Q.
    """

    input_ids: Tensor
    """(1, tokens)"""
    position_ids: Tensor
    """(1, tokens): a prefix counts from 0, a suffix from the length of its prefix."""
    targets: Tensor
    """(1, tokens)"""
    prefixes: RaggedIndex | None
    """Index of the prefixes, one per group; None if all are empty."""
    suffixes: RaggedIndex
    prefix_of: Tensor
    """(suffixes,): the group, and so the row in `prefixes`, of each suffix."""
    _masks: dict[tuple[torch.dtype, int], Tensor] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def from_groups(cls, groups: Sequence[PrefixGroup], device: torch.device) -> PackedBatch:
        prefixes = [group.prefix for group in groups]
        suffixes = [suffix for group in groups for suffix in group.suffixes]
        prefix_of = [i for i, group in enumerate(groups) for _ in group.suffixes]
        # The row is the concatenation of these sequences, prefixes first.
        sequences = [*prefixes, *(suffix.ids for suffix in suffixes)]
        starts = [0] * len(prefixes) + [len(prefixes[i]) for i in prefix_of]
        positions = [range(start, start + len(ids)) for start, ids in zip(starts, sequences, strict=True)]
        prefix_tokens = sum(map(len, prefixes))  # the first suffix begins here in the row
        targets = [[IGNORED] * prefix_tokens, *(suffix.targets for suffix in suffixes)]

        def tensor(values: list[int]) -> Tensor:
            return torch.tensor(values, device=device)

        return cls(
            input_ids=tensor([*chain(*sequences)])[None],
            position_ids=tensor([*chain(*positions)])[None],
            targets=tensor([*chain(*targets)])[None],
            prefixes=RaggedIndex.from_lengths(list(map(len, prefixes)), 0, device) if any(prefixes) else None,
            suffixes=RaggedIndex.from_lengths([len(s.ids) for s in suffixes], prefix_tokens, device),
            prefix_of=tensor(prefix_of),
        )

    @classmethod
    def from_prompts(cls, prompts: Sequence[list[int]], device: torch.device) -> PackedBatch:
        """Pack prompts, one group with their common prefix, and mark the last token of each with target 0.

        The target's value has no meaning: it selects the position after which a token is to be predicted.
        """
        # Every prompt keeps at least its last token as a suffix, which is where its prediction comes from.
        shared = min(common_prefix_length(prompts), min(map(len, prompts)) - 1)
        targets = [[IGNORED] * (len(ids) - shared - 1) + [0] for ids in prompts]
        suffixes = [Suffix(ids[shared:], marks) for ids, marks in zip(prompts, targets, strict=True)]
        return cls.from_groups([PrefixGroup(prompts[0][:shared], suffixes)], device)

    def target_positions(self) -> Tensor:
        """(targets,): positions in the row of the tokens that have a target."""
        return (self.targets[0] != IGNORED).nonzero()[:, 0]

    def mask(self, dtype: torch.dtype, group: int) -> Tensor:
        """Mask to add to the products of query and key: 0 for keys that a suffix's token may see, else −∞.

        A token sees its whole prefix, and of its suffix itself and the tokens before it. The mask has the
        shape (suffixes, 1, group · longest suffix, longest prefix + longest suffix): the `group` heads of a
        key head are stacked. Where no prefix has padding, all suffixes have the same mask, and the first
        dimension is 1.

        All layers share one tensor, because autograd keeps each layer's mask for the backward pass. With a
        boolean mask every layer would make, and keep, an additive one of its own.
        """
        if (dtype, group) not in self._masks:
            assert self.prefixes is not None
            is_prefix = self.prefixes.is_token  # (prefixes, longest prefix)
            one_length = self.prefixes.cells.numel() == self.prefixes.index.numel()
            is_prefix = is_prefix[:1] if one_length else is_prefix[self.prefix_of]
            longest, first = self.suffixes.index.shape[1], is_prefix.shape[1]
            keys = first + longest
            shape = (len(is_prefix), group, longest, -(-keys // ALIGNMENT) * ALIGNMENT)
            mask = torch.zeros(shape, dtype=dtype, device=is_prefix.device)
            # Keys of a row: the prefix, of which only padding is hidden, then the suffix itself, of which
            # triu(1) hides what follows the token: token t sees 0 … t. Zero is visible, −∞ is hidden.
            mask[..., :first].masked_fill_(~is_prefix[:, None, None], -torch.inf)
            mask[..., first:keys] = torch.full_like(mask[0, 0, :, first:keys], -torch.inf).triu(1)
            # Row h · longest + t is token t of the h-th head of a key head, as `_masked` stacks queries. The
            # columns that ALIGNMENT added are cut off, but stay in the stride.
            self._masks[dtype, group] = mask.flatten(1, 2)[:, None, :, :keys]
        return self._masks[dtype, group]

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, **args: Any) -> Tensor:
        """Compute attention (see `AttentionLayout`): prefixes by themselves, then suffixes after them."""
        # (suffixes, heads, longest, width)
        q, k, v = (self.suffixes.rectangle(x) for x in (query, key, value))
        if self.prefixes is None:
            return self.suffixes.flatten(_causal(q, k, v, **args))[None]
        prefix_q, prefix_k, prefix_v = (self.prefixes.rectangle(x) for x in (query, key, value))
        # The keys and values of a suffix are those of its prefix, then its own.
        k, v = (
            torch.cat([of_prefix.index_select(0, self.prefix_of), of_suffix], 2)
            for of_prefix, of_suffix in ((prefix_k, k), (prefix_v, v))
        )  # (suffixes, key heads, longest prefix + longest suffix, width)
        prefix_output = self.prefixes.flatten(_causal(prefix_q, prefix_k, prefix_v, **args))
        mask = self.mask(q.dtype, q.shape[1] // k.shape[1])
        suffix_output = self.suffixes.flatten(_masked(q, k, v, mask, **args))
        return torch.cat([prefix_output, suffix_output])[None]  # in the order of the row


@dataclass(frozen=True)
class RaggedIndex:
    """Index between sequences of several lengths that follow one another in a row, and a padded rectangle.

    The rectangle is (sequences, longest), with padding on the right.
    """

    index: Tensor
    """(sequences, longest): position in the row of each cell; padding has that of the first token."""
    is_token: Tensor
    """(sequences, longest): True for tokens, False for padding."""
    cells: Tensor
    """(tokens,): cell of each token, in the order of the row, in the flattened rectangle."""

    @classmethod
    def from_lengths(cls, lengths: list[int], first: int, device: torch.device) -> RaggedIndex:
        """Index sequences of these lengths, the first of which begins at position `first` of the row."""
        sizes = torch.tensor(lengths, device=device)  # (sequences,)
        column = torch.arange(int(sizes.max()), device=device)  # (longest,)
        is_token = column < sizes[:, None]  # (sequences, longest)
        starts = first + sizes.cumsum(0) - sizes  # each sequence begins where the one before it ends
        index = torch.where(is_token, starts[:, None] + column, first)
        return cls(index, is_token, is_token.flatten().nonzero()[:, 0])

    def rectangle(self, x: Tensor) -> Tensor:
        """(1, heads, tokens, width) → (sequences, heads, longest, width); padding repeats the first token."""
        gathered = x[0].index_select(1, self.index.flatten())  # (heads, sequences · longest, width)
        return gathered.view(x.shape[1], *self.index.shape, x.shape[3]).transpose(0, 1)

    def spread(self, x: Tensor) -> Tensor:
        """(tokens, width) → (sequences, longest, width); padding is zero."""
        padded = x.new_zeros(self.is_token.numel(), x.shape[1]).index_copy_(0, self.cells, x)
        return padded.view(*self.is_token.shape, -1)

    def flatten(self, x: Tensor) -> Tensor:
        """(sequences, heads, longest, width) → (tokens, heads, width), without the padding."""
        return x.transpose(1, 2).flatten(0, 1).index_select(0, self.cells)


def _causal(query: Tensor, key: Tensor, value: Tensor, **args: Any) -> Tensor:
    """Causal attention within each sequence of a rectangle.

    Padding is on the right, so no token sees it; what is computed for the padding itself is discarded later.
    """
    grouped = query.shape[1] != key.shape[1]
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=grouped, **args)


def _masked(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, **args: Any) -> Tensor:
    """Attention under `mask`, in which heads that share a key head are stacked along the token axis.

    So no key has to be repeated for each of its heads. query: (sequences, heads, tokens, width); mask:
    (sequences or 1, 1, heads of a key · tokens, keys).
    """
    sequences, heads, tokens, width = query.shape
    key_heads = key.shape[1]
    group = heads // key_heads  # heads g · group … (g + 1) · group − 1 use key head g
    query = query.reshape(sequences, key_heads, group * tokens, width)
    short = query.device.type == "cpu" and query.dtype == torch.bfloat16 and key.shape[2] <= SHORT
    if short and not args["dropout_p"]:
        # The fused kernel's backward pass takes twice as long: training is 1.15 times as fast without it.
        scores = query.float() @ key.float().transpose(-1, -2) * args["scale"] + mask
        output = (scores.softmax(-1) @ value.float()).to(query.dtype)
    else:
        output = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, **args)
    # Values may have another width, and CUDA's memory-efficient kernel returns a transposed tensor.
    return output.reshape(sequences, heads, tokens, -1)


def padded(
    rows: Sequence[list[int]], pad: int, device: torch.device, side: str = "left"
) -> tuple[Tensor, Tensor]:
    """Token ids, padded on that side, and attention mask: (rows, longest) each.

    The mask is built from the lengths, because `pad` may be the EOS token, which occurs in texts.
    """
    ids, mask = (
        pad_sequence([torch.tensor(row) for row in sequences], True, fill, side).to(device)
        for sequences, fill in ((rows, pad), ([[1] * len(row) for row in rows], 0))
    )
    return ids, mask


def common_prefix_length(rows: Sequence[list[int]]) -> int:
    # In sorted order the first and the last row differ earliest: all rows between share their common prefix.
    first, last = min(rows), max(rows)
    return next(
        (i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last))
    )
