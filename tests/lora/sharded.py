"""Trains packed weights under a sharding wrapper, in the processes of a launcher.

test_frozen.py starts it and reads its files:

    torchrun --nproc-per-node 2 tests/lora/sharded.py fsdp2|zero2 MODEL OUT

Writes `before.safetensors` and `masks.safetensors`, and from each process `after-RANK.safetensors` with whole
weights.
"""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn

from stages.config import LoraSection, ModelSection
from stages.lora import adapter
from stages.lora.training import pack
from stages.models.base import load_base

STEPS = 3


def batches(vocabulary: int):
    """Other rows in each process, the same in every run."""
    generator = torch.Generator().manual_seed(100 + dist.get_rank())
    for _ in range(STEPS):
        yield torch.randint(5, vocabulary, (2, 16), generator=generator)


def fsdp2(model: nn.Module, vocabulary: int) -> dict[str, Tensor]:
    """torch's fully_shard, layer by layer; returns the whole trained values by parameter name."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.get_submodule("base_model.model.model.layers"):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1
    )
    for ids in batches(vocabulary):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: p.full_tensor().detach() for name, p in model.named_parameters() if p.requires_grad}


def zero2(model: nn.Module, vocabulary: int) -> dict[str, Tensor]:
    """DeepSpeed's ZeRO stage 2."""
    import deepspeed

    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1
    )
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": {"stage": 2},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    for ids in batches(vocabulary):
        engine.backward(engine(input_ids=ids, labels=ids).loss)
        engine.step()
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def main(way: str, folder: str, out: Path) -> None:
    dist.init_process_group("gloo")
    base = load_base(ModelSection(name=folder, dtype="float32")).to("cpu")  # gloo
    model = adapter.initial(base, LoraSection(r=4), seed=0)
    layers = adapter.lora_layers(model)
    before = {name: layer.weight.detach().clone() for name, layer in layers.items()}
    generator = torch.Generator().manual_seed(1)
    masks = {name: torch.rand(w.shape, generator=generator) < 0.4 for name, w in before.items()}
    for layer in layers.values():
        layer.weight.requires_grad_(True)
    pack(model, masks)
    vocabulary = base.config.vocab_size
    trained = {"fsdp2": fsdp2, "zero2": zero2}[way](model, vocabulary)
    after = {}
    for name, layer in adapter.lora_layers(model).items():
        whole = layer._dense.clone()  # what the layer itself holds of the frozen elements
        whole[masks[name]] = trained[name.removesuffix("weight") + "default.values"].to(whole)
        after[name] = whole.contiguous()
    save_file(after, out / f"after-{dist.get_rank()}.safetensors")
    if dist.get_rank() == 0:
        save_file(before, out / "before.safetensors")
        save_file(masks, out / "masks.safetensors")
    dist.barrier()
    os._exit(0)  # DeepSpeed and gloo may wait for each other at the end


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
