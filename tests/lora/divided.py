"""What a divided base holds and answers, in the processes of a launcher; test_fsdp.py starts it."""

import os
import sys
import weakref
from pathlib import Path

import torch
from accelerate import Accelerator
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from stages.config import LaunchSection, LoraSection, ModelSection
from stages.lora.adapter import adapter, fsdp
from stages.lora.adapter.merge import merged_parameters
from stages.models.base import decoder_layers, load_base
from stages.runtime import distributed

FSDP2, LORA = LaunchSection(backend="fsdp2"), LoraSection(r=4)
EXACT = {"rtol": 0.0, "atol": 0.0} if fsdp.device().type == "cpu" else {"rtol": 1e-3, "atol": 1e-4}
"""A GPU rounds in another order than the CPU with the whole model."""


def watch(log: Path) -> None:
    """Write a line into the log when this process has read a base, and when none of its layers is whole."""
    read, alive = AutoModelForCausalLM.from_pretrained, set()

    def write(what: str) -> None:
        with log.open("a", encoding="utf-8") as file:
            file.write(f"{distributed.rank()} {what}\n")

    def free(weight: int) -> None:
        alive.remove(weight)
        if not alive:
            write("shares")

    def watched(*args, **kwargs):
        base, report = read(*args, **kwargs)
        for layer in decoder_layers(base):
            for weight in layer.parameters():
                alive.add(id(weight))
                weakref.finalize(weight, free, id(weight))
        write("reads")
        return base, report

    AutoModelForCausalLM.from_pretrained = watched


def main(folder: str, log: Path) -> None:
    model = ModelSection(name=folder, dtype="float32")
    one = adapter.initial(load_base(model, torch.device("cpu")), LORA, seed=0)
    watch(log)
    two = adapter.initial(fsdp.load(model, FSDP2), LORA, seed=0)
    fsdp.shard_base(two, model, FSDP2)
    held = {name: weight for name, weight in two.named_parameters() if isinstance(weight, DTensor)}
    layers = {name for name, _ in one.named_parameters() if ".layers." in name and ".lora_" not in name}
    assert held.keys() == layers and layers, held.keys() ^ layers
    assert all(weight.to_local().numel() * 2 == weight.numel() for weight in held.values())

    assert Accelerator(cpu=fsdp.device().type == "cpu").prepare_model(two) is two  # no DDP around it

    # Each process asks something else.
    generator = torch.Generator().manual_seed(distributed.rank())
    ids = torch.randint(5, 100, (1, 7 + distributed.rank()), generator=generator)
    where = fsdp.device()
    with torch.no_grad():
        wanted = one(input_ids=ids).logits
        torch.testing.assert_close(two(input_ids=ids.to(where)).logits.cpu(), wanted, **EXACT)
        with fsdp.unsharded(two):
            assert not any(isinstance(weight, DTensor) for weight in two.parameters())
            for _ in range(3 * distributed.rank()):  # the others do not wait
                torch.testing.assert_close(two(input_ids=ids.to(where)).logits.cpu(), wanted, **EXACT)
    assert all(isinstance(weight, DTensor) for name, weight in two.named_parameters() if name in held)
    merged = dict(merged_parameters(two))
    for name, weight in merged_parameters(one):
        torch.testing.assert_close(merged[name].cpu(), weight, **EXACT)
    distributed.barrier()
    os._exit(0)  # gloo's processes may wait for each other at the end


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
