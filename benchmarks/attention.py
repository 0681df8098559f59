"""Attention of a GRPO micro batch in which completions share prompts: lorapar's rectangles and FlexAttention.

    python benchmarks/attention.py [--prompts 2] [--group 8] [--prompt 256] [--completion 64-512] [--pairs 20]

Both see the same row, a `PackedBatch`. Rectangles: what training computes, torch's attention over one
rectangle of completions with a dense mask, each behind a copy of its prompt's keys. Flex: FlexAttention over
the row as it stands, with a block mask of the same rule. Padded: every completion with a prompt of its own,
causal, which is TRL's way. Random numbers in the shapes of one layer, those of Qwen2.5-0.5B unless told
otherwise.

The outputs are compared first. Then each pair takes one forward and backward pass of each, in an order drawn
at random; the ratio is theirs / rectangles, the median of pairs, with a bootstrap interval. FlexAttention
has no backward pass on a CPU and is compiled on a GPU only: without one only forward passes are timed.

torch's attention may use its flash and memory-efficient kernels alone, which keep no scores: where neither
takes the mask, this ends with an error.
"""

import argparse
import random
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from measure import from_to, in_turns, options, ratio, timed
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from stages.packing.batch import PackedBatch
from stages.packing.trainer_inputs import prefix_groups

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def block_mask(row: PackedBatch) -> BlockMask:
    """A token sees its own sequence up to itself, and in a completion the beginning of that, too."""
    size = row.input_ids.shape[1]
    sequence = torch.zeros(size, dtype=torch.long, device=DEVICE)
    before = torch.full((size,), -1, device=DEVICE)
    assert row.prefixes is not None
    sequence[row.prefixes.index[row.prefixes.is_token]] = row.prefixes.sequence_of()
    own = row.suffixes.index[row.suffixes.is_token]
    sequence[own] = len(row.prefixes.index) + row.suffixes.sequence_of()
    before[own] = row.prefix_of[row.suffixes.sequence_of()]

    def sees(_: Tensor, __: Tensor, query: Tensor, key: Tensor) -> Tensor:
        behind = (sequence[query] == sequence[key]) & (key <= query)
        return behind | (before[query] == sequence[key])

    return create_block_mask(sees, None, None, size, size, device=DEVICE.type)


def inputs(given: argparse.Namespace, tokens: int, rows: int = 1) -> list[Tensor]:
    """Query, key and value, (rows, heads, tokens, width)."""
    kind = {"device": DEVICE, "dtype": getattr(torch, given.dtype), "requires_grad": DEVICE.type == "cuda"}
    shapes = [(rows, heads, tokens, given.width) for heads in (given.heads, given.keys, given.keys)]
    return [torch.randn(*shape, **kind) for shape in shapes]


@dataclass(frozen=True)
class Way:
    attend: Callable[[], Tensor]
    given: list[Tensor]

    def __call__(self) -> None:
        """One pass; no gradient stays."""
        found = self.attend()
        if found.requires_grad:
            torch.autograd.grad(found.sum(), self.given)


def ways(given: argparse.Namespace) -> dict[str, Way]:
    lengths = [
        random.Random(0).randint(*from_to(given.completion)) for _ in range(given.prompts * given.group)
    ]
    prompts = [[i] * given.prompt for i in range(given.prompts) for _ in range(given.group)]
    row = PackedBatch.from_groups(prefix_groups(prompts, [[0] * n for n in lengths]), DEVICE)
    own = q, k, v = inputs(given, row.input_ids.shape[1])
    padded = inputs(given, given.prompt + max(lengths), len(lengths))
    flex = torch.compile(flex_attention, dynamic=True) if DEVICE.type == "cuda" else flex_attention
    mask, grouped = block_mask(row), given.heads != given.keys
    return {
        "rectangles": Way(lambda: row.attend(0, q, k, v), own),
        "flex": Way(lambda: flex(q, k, v, block_mask=mask, enable_gqa=grouped).transpose(1, 2), own),
        "padded": Way(
            lambda: F.scaled_dot_product_attention(*padded, is_causal=True, enable_gqa=grouped), padded
        ),
    }


def main() -> None:
    dtype = "bfloat16" if DEVICE.type == "cuda" else "float32"
    rows = {"prompts": 2, "group": 8, "prompt": 256, "completion": "64-512"}
    given = options(__doc__, **rows, heads=14, keys=2, width=64, dtype=dtype, pairs=20).parse_args()
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]):
        compare(given)


def compare(given: argparse.Namespace) -> None:
    found = ways(given)
    gap = float((found["flex"].attend() - found["rectangles"].attend()).abs().max())
    print(f"largest difference of an output, flex and rectangles: {gap:.1e}")
    assert gap < (1e-4 if given.dtype == "float32" else 0.1), gap
    peaks = {}
    for name, way in found.items():
        way()  # compiles
        if DEVICE.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            way()
            peaks[name] = torch.cuda.max_memory_allocated() / 2**20
    seconds = in_turns(list(found), given.pairs, lambda name, _: timed(found[name]))
    ours = seconds.pop("rectangles")
    for name, theirs in seconds.items():
        print(f"{name} / rectangles, ratio of times: {ratio(theirs, ours)}")
    for name, mib in peaks.items():
        print(f"{name}: peak {mib:.0f} MiB, of all inputs and one pass")


if __name__ == "__main__":
    main()
