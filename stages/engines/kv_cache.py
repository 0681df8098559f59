"""KV cache of continuous batching, with the attention of a prefill and of a decode step over it."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from stages.packing.batch import PackedBatch

COLUMNS = 64
"""Columns (tokens per row) by which the cache grows."""


class KVCache:
    """Keys and values of one completion per row, and the attention layout of a decode step.

    Column j of a row holds the token at position j. Columns behind a row's last token hold zeros, padding or
    an earlier completion; `mask` hides them, and the row's own tokens overwrite them one by one.
    """

    def __init__(self, rows: int) -> None:
        self.rows, self.columns = rows, 0
        self.keys, self.values = list[Tensor](), list[Tensor]()
        """By layer: (rows, key heads, columns, width)."""

    def reserve(self, columns: int) -> None:
        """Make room for this many tokens in each row."""
        if columns <= self.columns:
            return
        self.columns = -(-columns // COLUMNS) * COLUMNS  # rounded up to a multiple of COLUMNS
        for layers in (self.keys, self.values):
            for layer, old in enumerate(layers):
                layers[layer] = F.pad(old, (0, 0, 0, self.columns - old.shape[2]))

    def write(self, layer: int, key: Tensor, value: Tensor, rows: Tensor, first: int) -> None:
        """Write keys and values (rows, key heads, tokens, width) into these rows, from column `first` on."""
        if layer == len(self.keys):  # the first prefill, layer by layer: only now are the shapes known
            shape = (self.rows, key.shape[1], self.columns, key.shape[3])
            self.keys.append(key.new_zeros(shape))
            self.values.append(value.new_zeros(*shape[:3], value.shape[3]))
        for layers, new in ((self.keys, key), (self.values, value)):
            layers[layer][:, :, first : first + new.shape[2]].index_copy_(0, rows, new)

    def compact(self, rows: Tensor) -> None:
        """Drop all rows but these, which become rows 0, 1, … in this order."""
        self.rows = len(rows)
        for layers in (self.keys, self.values):
            for layer, old in enumerate(layers):
                layers[layer] = old.index_select(0, rows)

    def set_positions(self, rows: Tensor, positions: Tensor) -> None:
        """Prepare a decode step of one token for each of `rows`, which goes to the column `positions`.

        rows, positions: (active,) each. Every layer then calls `attend`.
        """
        self.length = int(positions.max()) + 1
        self.reserve(self.length)
        self.active, self.positions = rows, positions
        # Inactive rows get position 0: a row of the mask without any True would make softmax NaN.
        last = positions.new_zeros(self.rows).index_copy_(0, rows, positions)
        columns = torch.arange(self.length, device=positions.device)
        self.mask = (columns <= last[:, None])[:, None, None]  # (rows, 1, 1, length)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, **args: Any) -> Tensor:
        """Attention of a decode step for one new token per active row; caches its key and value.

        query: (1, heads, active, width), key and value with as many heads or fewer. Returns
        (1, active, heads, width). Inactive rows are computed too, and their output is discarded, so that the
        cache is read in place, without a copy of the active rows.
        """
        heads, width = query.shape[1], query.shape[3]
        keys, values = self.keys[layer], self.values[layer]
        keys[self.active, :, self.positions] = key[0].transpose(0, 1)  # (active, key heads, width)
        values[self.active, :, self.positions] = value[0].transpose(0, 1)
        queries = query.new_zeros(self.rows, heads, width)
        queries.index_copy_(0, self.active, query[0].transpose(0, 1))  # (rows, heads, width)
        # Grouped-query attention: the query heads that share a key head take the place of query tokens.
        output = F.scaled_dot_product_attention(
            queries.view(self.rows, keys.shape[1], heads // keys.shape[1], width),
            keys[:, :, : self.length],
            values[:, :, : self.length],
            attn_mask=self.mask,
            scale=args["scale"],
        )
        # CUDA's memory-efficient kernel returns a transposed tensor.
        return output.reshape(self.rows, heads, -1).index_select(0, self.active)[None]


@dataclass(frozen=True)
class Prefill:
    """Attention layout that computes a packed batch of prompts and caches their keys and values."""

    batch: PackedBatch
    cache: KVCache
    suffix_of: Tensor
    """(rows,): suffix of the batch that goes into each of `rows`; equal prompts share a suffix."""
    rows: Tensor
    """(rows,): rows of the cache to write."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, **args: Any) -> Tensor:
        """Cache keys and values, then attend within the batch; shapes as in `PackedBatch.attend`."""
        first = 0
        if self.batch.prefixes is not None:
            # The prompts have one prefix, which is copied into every row: (rows, key heads, prefix, width).
            k, v = (self.batch.prefixes.rectangle(x).expand(len(self.rows), -1, -1, -1) for x in (key, value))
            self.cache.write(layer, k, v, self.rows, first)
            first = k.shape[2]
        # (rows, key heads, longest suffix, width)
        k, v = (self.batch.suffixes.rectangle(x).index_select(0, self.suffix_of) for x in (key, value))
        self.cache.write(layer, k, v, self.rows, first)
        return self.batch.attend(layer, query, key, value, **args)
