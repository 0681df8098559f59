"""What the backward pass of a GRPO micro batch keeps, per token and layer: in all, and of it masks.

    python benchmarks/kept.py [--completions 8] [--length 512] [--prompt 128] [--layers 2] [--dtype bfloat16]

One row of completions with one prompt, through layers of Qwen2.5-7B's width with random weights and LoRA of
rank 8. Each tensor that autograd saves is counted, once per storage, and dropped, so that the script needs
memory for the weights and for one layer's pass. Weights and head are not counted.
"""

import argparse

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import AutoModelForCausalLM, Qwen2Config

from stages.config import LoraSection
from stages.lora.adapter import adapter
from stages.packing.batch import PackedBatch
from stages.packing.support import packed_hidden_states, supports_packing
from stages.packing.trl import prefix_groups

QWEN = {"hidden_size": 3584, "num_attention_heads": 28, "num_key_value_heads": 4, "intermediate_size": 18944}
WORDS = 256


def kept_bytes(model: torch.nn.Module, row: PackedBatch) -> tuple[int, int]:
    """Bytes that autograd keeps of a pass of `row`: all but weights, and of these masks."""
    assert row.prefixes is not None
    weights = {StorageWeakRef(weight.untyped_storage()) for weight in model.parameters()}
    # A StorageWeakRef keeps the address of a storage from being used again, though not its memory.
    all_bytes: dict[StorageWeakRef, int] = {}
    masks = set()
    keys = row.prefixes.index.shape[1] + row.suffixes.index.shape[1]

    def count(tensor: Tensor) -> None:
        storage = StorageWeakRef(tensor.untyped_storage())
        if storage not in weights:
            all_bytes[storage] = tensor.untyped_storage().nbytes()
            if tensor.dim() == 4 and tensor.shape[-1] == keys:
                masks.add(storage)

    with saved_tensors_hooks(count, lambda _: None):
        packed_hidden_states(model, row.input_ids, row.position_ids, row)
    return sum(all_bytes.values()), sum(all_bytes[mask] for mask in masks)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--completions", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--dtype", default="bfloat16")
    given = parser.parse_args()
    config = Qwen2Config(
        **QWEN, num_hidden_layers=given.layers, vocab_size=WORDS, dtype=getattr(torch, given.dtype)
    )
    model = adapter.initial(AutoModelForCausalLM.from_config(config), LoraSection(), 0).train()
    assert supports_packing(model, [5, 6, 7, 8])
    prompts = [[5] * given.prompt] * given.completions
    row = PackedBatch.of(
        prefix_groups(prompts, [[6] * given.length] * given.completions), torch.device("cpu")
    )
    tokens = row.input_ids.shape[1]
    every, masks = (number / tokens / given.layers for number in kept_bytes(model, row))
    print(f"{given.completions} × {given.length} tokens behind a prompt of {given.prompt}: {tokens} tokens")
    print(f"kept per token and layer: {every / 2**10:.1f} KiB, of it masks {masks / 2**10:.1f} KiB")


if __name__ == "__main__":
    main()
