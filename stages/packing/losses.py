"""Loss of each example, from one packed row, or from a padded batch if the architecture cannot be packed."""

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from stages.packing.batch import PackedBatch, PrefixGroup, Suffix, padded
from stages.packing.support import packed_logprobs, supports_packing
from stages.prompts.renderer import IGNORED, Row


def answer_losses(model: PreTrainedModel, rows: list[Row], pad: int, device: torch.device) -> Tensor:
    """Mean negative log-likelihood of each example over its answer tokens: (batch,), at least float32.

    pad: token that fills the rows, which the mask leaves out.
    """
    ids, mask = padded([row.input_ids for row in rows], pad, device, "right")  # (batch, tokens)
    labels, _ = padded([row.labels for row in rows], IGNORED, device, "right")
    # The first column in which any example has a label. It is predicted from the column before it, and logits
    # of columns further left, which belong to prompts, are not computed.
    first = int((labels != IGNORED).any(0).nonzero()[0])
    keep = ids.shape[1] - first + 1
    # (batch, answer columns, vocabulary): the last token predicts nothing
    logits = model(input_ids=ids, attention_mask=mask, logits_to_keep=keep).logits[:, :-1]
    wide = logits if logits.dtype.itemsize >= 4 else logits.float()
    targets = labels[:, first:]  # (batch, answer columns)
    losses = F.cross_entropy(wide.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="none")
    counts = (targets != IGNORED).sum(1)
    return losses.view(targets.shape).sum(1) / counts


def pack_rows(model: PreTrainedModel, rows: list[Row], device: torch.device) -> PackedBatch | None:
    """Pack the examples into one row without a shared prefix; None if `supports_packing` is False."""
    if not supports_packing(model, rows[0].input_ids):
        return None
    return PackedBatch.from_groups(
        # Each token predicts the next one, and the last predicts nothing.
        [PrefixGroup([], [Suffix(row.input_ids[:-1], row.labels[1:]) for row in rows])],
        device,
    )


def packed_answer_losses(model: PreTrainedModel, row: PackedBatch) -> Tensor:
    """Mean negative log-likelihood of each example, like `answer_losses`, of a packed row: (examples,)."""
    log_probs = packed_logprobs(model, row).log_probs  # (targets,)
    cells = row.suffixes.cells[row.target_positions()]  # (targets,): in a rectangle with a row per example
    example_of = cells // row.suffixes.is_token.shape[1]
    sums = log_probs.new_zeros(len(row.suffixes.index)).index_add(0, example_of, log_probs)
    return -sums / example_of.bincount(minlength=len(sums))
