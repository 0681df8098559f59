"""Keys and values of the answers that a model in this process is writing, and attention over them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from torch import Tensor

    from stages.packing.batch import AttentionArgs, PackedBatch

COLUMNS = 64
"""Tokens by which the memory grows."""


class KVCache:
    """Keys and values of the rows that are being written, and how one new token of some of them attends."""

    def __init__(self, rows: int) -> None:
        self.rows, self.columns = rows, 0
        self.keys: list[Tensor] = []
        """By layer: (rows, key heads, columns, width)."""
        self.values: list[Tensor] = []

    def reserve(self, columns: int) -> None:
        """Have room for so many tokens in each row."""
        if columns <= self.columns:
            return
        self.columns = -(-columns // COLUMNS) * COLUMNS
        for store in (self.keys, self.values):
            for layer, old in enumerate(store):
                store[layer] = F.pad(old, (0, 0, 0, self.columns - old.shape[2]))

    def write(self, layer: int, key: Tensor, value: Tensor, rows: Tensor, first: int) -> None:
        """Put tokens of all key heads (rows, heads, tokens, width) from column `first` on into these rows."""
        if layer == len(self.keys):
            shape = (self.rows, key.shape[1], self.columns, key.shape[3])
            self.keys.append(key.new_zeros(shape))
            self.values.append(value.new_zeros(*shape[:3], value.shape[3]))
        for store, new in ((self.keys, key), (self.values, value)):
            store[layer][:, :, first : first + new.shape[2]].index_copy_(0, rows, new)

    def compact(self, rows: Tensor) -> None:
        """Give up all other rows."""
        self.rows = len(rows)
        for store in (self.keys, self.values):
            for layer, old in enumerate(store):
                store[layer] = old.index_select(0, rows)

    def set_positions(self, rows: Tensor, at: Tensor) -> None:
        """Say where the next tokens go: into these rows, at these columns."""
        self.width = int(at.max()) + 1
        self.reserve(self.width)
        self.aimed, self.at = rows, at
        last = at.new_zeros(self.rows).index_copy_(0, rows, at)
        self.mask = (torch.arange(self.width, device=at.device) <= last[:, None])[:, None, None]

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, how: AttentionArgs) -> Tensor:
        """Of one token in each aimed row. Rows that are not aimed at are computed, too, and not used."""
        heads, width = query.shape[1], query.shape[3]
        keys, values = self.keys[layer], self.values[layer]
        keys[self.aimed, :, self.at] = key[0].transpose(0, 1)
        values[self.aimed, :, self.at] = value[0].transpose(0, 1)
        asked = query.new_zeros(self.rows, heads, width).index_copy_(0, self.aimed, query[0].transpose(0, 1))
        found = F.scaled_dot_product_attention(
            asked.view(self.rows, keys.shape[1], heads // keys.shape[1], width),
            keys[:, :, : self.width],
            values[:, :, : self.width],
            attn_mask=self.mask,
            scale=how.scale,
        )
        return found.view(self.rows, heads, -1).index_select(0, self.aimed)[None]


@dataclass(frozen=True)
class Prefill:
    """Attention over prompts that keeps what it reads: a branch of `row` goes into each row of `rows`."""

    row: PackedBatch
    memory: KVCache
    owner: Tensor
    """(rows,): the branch."""
    rows: Tensor

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, how: AttentionArgs) -> Tensor:
        first = 0
        if self.row.prefixes is not None:
            k, v = (self.row.prefixes.rectangle(x).expand(len(self.rows), -1, -1, -1) for x in (key, value))
            self.memory.write(layer, k, v, self.rows, first)
            first = k.shape[2]
        k, v = (self.row.suffixes.rectangle(x).index_select(0, self.owner) for x in (key, value))
        self.memory.write(layer, k, v, self.rows, first)
        return self.row.attend(layer, query, key, value, how)
