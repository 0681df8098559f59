"""The mask of completions that share a prompt: one for all layers, as torch's kernels take it."""

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

from stages.packing.batch import PackedBatch
from stages.packing.trainer_inputs import prefix_groups

PROMPT, COMPLETION, NUMBER, HEADS, KEYS, WIDTH = 11, 23, 4, 6, 2, 8


def row_of(*prompts: int) -> PackedBatch:
    """Completions, one of them shorter, of prompts of these lengths."""
    ids = [[i] * length for i, length in enumerate(prompts) for _ in range(NUMBER // len(prompts))]
    lengths = [COMPLETION] * (NUMBER - 1) + [COMPLETION - 5]
    return PackedBatch.from_groups(
        prefix_groups(ids, [[9] * length for length in lengths]), torch.device("cpu")
    )


def kept_bytes(row: PackedBatch, layers: int, dtype: torch.dtype) -> dict[str, int]:
    """Bytes that the backward pass of these layers keeps, of masks and of all else."""
    kept, masks = {}, set()
    keys = PROMPT - 1 + COMPLETION

    def keep(tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        kept[StorageWeakRef(storage)] = storage.nbytes()
        if tensor.dim() == 4 and tensor.shape[-1] == keys:
            masks.add(StorageWeakRef(storage))

    tokens = row.input_ids.shape[1]
    with saved_tensors_hooks(keep, lambda _: None):
        for layer in range(layers):
            q, k, v = (
                torch.randn(1, heads, tokens, WIDTH, dtype=dtype, requires_grad=True)
                for heads in (HEADS, KEYS, KEYS)
            )
            row.attend(layer, q, k, v)
    of_masks = sum(kept[storage] for storage in masks)
    return {"masks": of_masks, "number": len(masks), "rest": sum(kept.values()) - of_masks}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("prompts", "masks"), [([PROMPT], 1), ([PROMPT] * 2, 1), ([PROMPT, PROMPT - 3], NUMBER)]
)
def test_all_layers_keep_one_mask(prompts, masks, dtype):
    """Kept by each layer of a 7B model, those of 8 completions of 2,048 tokens took 13 GiB.

    Behind prompts of one length all completions see alike.
    """
    row = row_of(*prompts)
    one, three = kept_bytes(row, 1, dtype), kept_bytes(row, 3, dtype)
    padded = 8 * -(-(PROMPT - 1 + COMPLETION) // 8)
    assert one["masks"] == three["masks"] == masks * HEADS // KEYS * COMPLETION * padded * dtype.itemsize
    assert one["number"] == three["number"] == 1
    assert 2.9 * one["rest"] < three["rest"] < 3.1 * one["rest"]
