"""What training single elements costs: plain LoRA, masking by a gradient hook, packed weights, side by side.

    python benchmarks/train.py MODEL [--share 0.4] [--batch 4] [--tokens 128] [--pairs 30]

Time: forward and backward, then a whole step (clipping, AdamW, and for packed weights the refresh), each
measured in turns on one base model; medians of paired ratios to plain LoRA with a bootstrap interval. Memory:
bytes of everything that the adapter's training holds, counted tensor by tensor, after a step and at its peak;
and the peak of a process (of the device, on a GPU) that trains only this way.

The peak of the adapter's own bytes is the end of a forward pass while gradients of an earlier micro batch are
held: what is there after a step, and what the LoRA layers save for the backward, which then frees it layer by
layer. Counted is each storage that autograd saves inside these layers, once, but for the layer's input, which
every way saves, and for what is held anyway. A plain layer saves its weight, which is held; a packed one the
dense weight that it made and its indices in 64 bits. Activations and the temporaries of one layer are in the
peak of a process only.
"""

import argparse
import copy
import statistics
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from measure import in_turns, machine, options, peak, random_masks, ratio, timed
from torch import Tensor, nn

from stages.config import LoraSection, ModelSection
from stages.lora.adapter import adapter
from stages.lora.adapter.elements import SparseLinear, sparsify
from stages.models.base import load_base
from stages.runtime import resources

WAYS = ("plain", "hook", "packed")


class Way:
    """One model with its adapter and optimizer, trained one way."""

    def __init__(self, way: str, base: nn.Module, lora: LoraSection, share: float) -> None:
        self.model = adapter.initial(base, lora, seed=0)
        layers = adapter.lora_layers(self.model)
        masks = random_masks(layers, share)
        self.elements = sum(mask.numel() for mask in masks.values())
        self.active = sum(int(mask.sum()) for mask in masks.values())
        for layer in layers.values():
            layer.weight.requires_grad_(True)
        self.masks: list[Tensor] = []
        if way == "packed":
            sparsify(self.model, masks)
        if way == "hook":
            for name, layer in layers.items():
                mask = masks[name].to(layer.weight.device)
                self.masks.append(mask)
                layer.weight.register_hook(lambda grad, mask=mask: grad * mask)
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-4, weight_decay=0.1, fused=True)
        self.model.train()

    def gradients(self, ids: Tensor) -> None:
        self.model(input_ids=ids, labels=ids).loss.backward()

    def step(self) -> None:
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def bytes(self) -> dict[str, int]:
        """Every tensor that exists because of the adapter, after a step, by what it is for."""
        packed = [m for m in self.model.modules() if isinstance(m, SparseLinear)]
        states = [tensor for state in self.optimizer.state.values() for tensor in state.values()]
        return {
            "weights": size([m._dense for m in packed] if packed else self.parameters),
            "values": size(self.parameters) if packed else 0,
            "masks": size([m._index for m in packed] + self.masks),
            "gradients": size([p.grad for p in self.parameters]),
            "optimizer": size([t for t in states if isinstance(t, Tensor) and t.numel() > 1]),
        }

    def saved(self, ids: Tensor) -> int:
        """Bytes that the LoRA layers save for the backward, beside their input and what is held anyway."""
        layers = adapter.lora_layers(self.model).values()
        held = {p.untyped_storage().data_ptr() for p in self.parameters}
        for layer in layers:
            held |= {t.untyped_storage().data_ptr() for t in vars(layer).values() if isinstance(t, Tensor)}
        kept: dict[int, Tensor] = {}  # by storage; the tensors live on, so no address comes twice
        with ExitStack() as stack:
            for layer in layers:
                stack.enter_context(watched(layer, held, kept))
            self.gradients(ids)
        self.optimizer.zero_grad()
        return sum(t.untyped_storage().nbytes() for t in kept.values())


@contextmanager
def watched(layer: nn.Module, held: set[int], kept: dict[int, Tensor]) -> Iterator[None]:
    """Inside, what the layer saves for the backward beside its input and `held` comes into `kept`."""
    forward = layer.forward

    def call(input: Tensor) -> Tensor:
        known = {*held, input.untyped_storage().data_ptr()}

        def pack(tensor: Tensor) -> Tensor:
            if tensor.untyped_storage().data_ptr() not in known:
                kept[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            return forward(input)

    layer.forward = call
    try:
        yield
    finally:
        del layer.forward


def size(tensors: list[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def main() -> None:
    parser = options(__doc__, "model", share=0.4, batch=4, tokens=128, pairs=30, dtype="float32", r=8)
    parser.add_argument("--only", choices=WAYS, help=argparse.SUPPRESS)
    given = parser.parse_args()

    base = load_base(ModelSection(name=given.model, dtype=given.dtype, attention="eager"))
    lora = LoraSection(r=given.r)
    ids = torch.randint(10, base.config.vocab_size, (given.batch, given.tokens), device=base.device)
    if given.only:
        way = Way(given.only, base, lora, given.share)
        for _ in range(2):
            way.gradients(ids)
            way.step()
        print(resources.peak_device_memory())
        return

    ways = {name: Way(name, copy.deepcopy(base), lora, given.share) for name in WAYS}
    total, active = ways["packed"].elements, ways["packed"].active
    print(
        f"{given.model}, {given.dtype}, {given.batch} × {given.tokens} tokens, "
        f"{active:,} of {total:,} elements active ({active / total:.4f}), "
        f"{machine(base.device)}"
    )
    held: dict[str, dict[str, int]] = {}
    saved: dict[str, int] = {}
    for name, way in ways.items():  # warm up; the bytes are counted while gradients exist
        way.gradients(ids)
        way.step()
        way.gradients(ids)
        held[name] = way.bytes()
        way.step()
        saved[name] = way.saved(ids)
    pairs = in_turns(
        WAYS, given.pairs, lambda name, _: (timed(ways[name].gradients, ids), timed(ways[name].step))
    )
    passes = {name: [of_passes for of_passes, _ in pairs[name]] for name in WAYS}
    steps = {name: [sum(pair) for pair in pairs[name]] for name in WAYS}
    for name in WAYS:
        print(
            f"{name:<7} forward+backward {ratio(passes[name], passes['plain'])} of plain, "
            f"whole step {ratio(steps[name], steps['plain'])}, "
            f"median step {statistics.median(steps[name]):.3f} s, fastest {min(steps[name]):.3f} s"
        )
    for name in WAYS:
        parts = ", ".join(f"{what} {number:,}" for what, number in held[name].items() if number)
        after, most = (sum(held[name].values()) + more for more in (0, saved[name]))
        of_plain = [n / sum(held["plain"].values()) for n in (after, most)]
        print(f"{name:<7} after a step {after:,} bytes ({of_plain[0]:.3f} of plain): {parts}")
        print(
            f"{name:<7} at the peak {most:,} bytes ({of_plain[1]:.3f} of plain), {saved[name]:,} of them "
            f"saved; peak of a process {peak(__file__, name):,.0f} MiB"
        )
    packed, plain = (held[name]["gradients"] + held[name]["optimizer"] for name in ("packed", "plain"))
    share, wanted = packed / plain, active / total
    print(
        f"gradients + optimizer: packed / plain {share:.4f}, active share {wanted:.4f}, "
        f"ratio {share / wanted:.4f}"
    )


if __name__ == "__main__":
    main()
