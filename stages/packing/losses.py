"""Each example's loss: by one row without padding, or by a padded batch where the architecture needs that."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from stages.prompts.renderer import IGNORED, Row

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedModel

    from stages.packing.batch import PackedBatch


@dataclass
class Batch:
    """Right-padded rows: (batch, tokens) each."""

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor


def collate(rows: list[Row], pad: int, device: torch.device) -> Batch:
    """Pad rows on the right. The mask goes by length, because `pad` may be the EOS token."""
    import torch

    longest = max(len(row.input_ids) for row in rows)
    ids = torch.full((len(rows), longest), pad)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORED)
    for i, row in enumerate(rows):
        n = len(row.input_ids)
        ids[i, :n], labels[i, :n], mask[i, :n] = torch.tensor(row.input_ids), torch.tensor(row.labels), 1
    return Batch(ids.to(device), mask.to(device), labels.to(device))


def answer_losses(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Each example's mean negative log-likelihood over its answer tokens: (batch,), at least float32."""
    import torch.nn.functional as F

    first = int((batch.labels != IGNORED).any(0).nonzero()[0])
    keep = batch.input_ids.shape[1] - first + 1  # logits of the prompt are never needed
    logits = model(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask, logits_to_keep=keep
    ).logits[:, :-1]
    wide = logits if logits.dtype.itemsize >= 4 else logits.float()
    targets = batch.labels[:, first:]  # (batch, answer tokens)
    losses = F.cross_entropy(wide.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="none")
    counts = (targets != IGNORED).sum(1)
    return losses.view(targets.shape).sum(1) / counts


def pack_rows(model: PreTrainedModel, rows: list[Row], device: torch.device) -> PackedBatch | None:
    """The rows as one, in which no beginning is shared; None if it would not give the model's own numbers."""
    from stages.packing.batch import PackedBatch, PrefixGroup, Suffix
    from stages.packing.support import supports_packing

    if not supports_packing(model, rows[0].input_ids):
        return None
    return PackedBatch.of(
        [PrefixGroup([], [Suffix(row.input_ids[:-1], row.labels[1:]) for row in rows])], device
    )


def packed_answer_losses(model: PreTrainedModel, row: PackedBatch) -> Tensor:
    """The same as `answer_losses` for the examples of a row: (examples,)."""
    from stages.packing.support import packed_logprobs

    found = packed_logprobs(model, row).log_probs
    owner = row.suffixes.sequence_of()[row.target_positions()]
    sums = found.new_zeros(len(row.suffixes.index)).index_add(0, owner, found)
    return -sums / owner.bincount(minlength=len(sums))
