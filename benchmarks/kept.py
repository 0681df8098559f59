"""What the backward pass of a GRPO micro batch keeps, per token and layer: in all, and of it masks.

    python benchmarks/kept.py [--completions 8] [--length 512] [--prompt 128] [--layers 2] [--dtype bfloat16]

One row of completions with one prompt, through layers of Qwen2.5-7B's width with LoRA of rank 8. Tensors are
torch's fake ones: they have shapes and no numbers, so this takes seconds and no memory. Each tensor that
autograd saves counts once per storage; weights and the head do not count.
"""

import argparse
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import AutoModelForCausalLM, Qwen2Config

from stages.config import LoraSection
from stages.packing.batch import PackedBatch
from stages.packing.support import MARK, packed_hidden_states
from stages.packing.trainer_inputs import prefix_groups

QWEN = {"hidden_size": 3584, "num_attention_heads": 28, "num_key_value_heads": 4, "intermediate_size": 18944}
WORDS = 256


def adapted(layers: int, dtype: torch.dtype) -> Any:
    """The model without numbers; its pages are never written, so they take no memory."""
    config = Qwen2Config(**QWEN, num_hidden_layers=layers, vocab_size=WORDS, dtype=dtype)
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(config)
        model = get_peft_model(base, LoraConfig(r=8, target_modules=LoraSection().target_modules))
    base.set_attn_implementation(MARK + "sdpa")
    return model.to_empty(device="cpu").train()


def fake(model: nn.Module, mode: FakeTensorMode) -> None:
    """Put fake tensors in place of all weights and buffers."""
    for module in model.modules():
        for name, weight in module._parameters.items():
            if weight is not None:
                fake_weight = mode.from_tensor(weight.detach())
                module._parameters[name] = nn.Parameter(fake_weight, requires_grad=weight.requires_grad)
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else mode.from_tensor(buffer)


def kept_bytes(model: nn.Module, row: PackedBatch) -> tuple[int, int]:
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
    prompts = [[5] * given.prompt] * given.completions
    completions = [[6] * given.length] * given.completions
    row = PackedBatch.from_groups(prefix_groups(prompts, completions), torch.device("cpu"))
    model = adapted(given.layers, getattr(torch, given.dtype))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake(model, mode)
        every, masks = kept_bytes(model, row)
    tokens = row.input_ids.shape[1]
    print(f"{given.completions} × {given.length} tokens behind a prompt of {given.prompt}: {tokens} tokens")
    for name, number in (("kept", every), ("of it masks", masks)):
        each = number / tokens / given.layers / 2**10
        print(
            f"{name}: {each:.2f} KiB per token and layer, {number / 2**30:.3f} GiB in {given.layers} layers"
        )


if __name__ == "__main__":
    main()
