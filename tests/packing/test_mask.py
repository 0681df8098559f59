"""The mask of completions that share a prompt: one for all layers, as torch's kernels take it."""

import pytest
import torch

from stages.packing.batch import PackedBatch
from stages.packing.trainer_inputs import prefix_groups

PROMPT, COMPLETION, NUMBER = 11, 23, 4


def row_of(*prompts: int) -> PackedBatch:
    """Completions, one of them shorter, of prompts of these lengths."""
    ids = [[i] * length for i, length in enumerate(prompts) for _ in range(NUMBER // len(prompts))]
    lengths = [COMPLETION] * (NUMBER - 1) + [COMPLETION - 5]
    return PackedBatch.from_groups(
        prefix_groups(ids, [[9] * length for length in lengths]), torch.device("cpu")
    )


@pytest.mark.parametrize(
    ("prompts", "masks"), [([PROMPT], 1), ([PROMPT] * 2, 1), ([PROMPT, PROMPT - 3], NUMBER)]
)
def test_all_layers_keep_one_mask(prompts, masks):
    """Kept by each layer of a 7B model, those of 8 completions of 2,048 tokens took 13 GiB.

    Behind prompts of one length all completions see alike. Strides of multiples of 8 spare CUDA a copy.
    """
    row = row_of(*prompts)
    mask = row.mask(torch.float32, 3)
    assert mask is row.mask(torch.float32, 3)
    assert mask.shape == (masks, 1, 3 * COMPLETION, PROMPT - 1 + COMPLETION)
    assert mask.stride(-1) == 1 and not any(stride % 8 for stride in mask.stride()[:-1])
    assert mask.isinf().logical_or(mask == 0).all() and not mask.isinf().all(-1).any()
