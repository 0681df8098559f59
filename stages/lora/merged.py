"""Weights with the adapter merged in, for sampling: a plain model is several times faster than LoRA layers on CPU.

Each is computed from the untouched base weight. Merging into the base and out again, as the library does for vLLM, drifts.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from stages.lora.adapter import lora_layers

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

ADAPTED = "base_model.model."
"""What PEFT puts before the name of every module."""


@torch.no_grad()
def merged(adapted: PeftModel) -> Iterator[tuple[str, Tensor]]:
    """Name in the plain model and W + scaling · B A, in W's type, of each weight that has an adapter."""
    layers = lora_layers(adapted)
    for name in layers:
        if not name.endswith(".lora_A.weight"):
            continue
        path = name.removesuffix(".lora_A.weight")
        wrapped = adapted.get_submodule(path)
        weight = wrapped.base_layer.weight
        a, b = layers[name].weight.float(), layers[f"{path}.lora_B.weight"].weight.float()
        whole = weight.float() + wrapped.scaling["default"] * (b @ a)
        yield f"{path.removeprefix(ADAPTED)}.weight", whole.to(weight.dtype)


def plain(adapted: PeftModel) -> Iterator[tuple[str, Tensor]]:
    """Name and value of every parameter of the plain model that answers like the adapted one; tied ones come once."""
    made = dict(merged(adapted))
    for name, parameter in adapted.named_parameters():
        name = name.removeprefix(ADAPTED).replace(".base_layer", "")
        if adapted.prefix not in name:
            yield name, made.pop(name, parameter.detach())
    assert not made, sorted(made)


class MergedCopy:
    """`copy.model` answers like the adapted model did at the last `refresh`, to the rounding of its type."""

    def __init__(self, base: PreTrainedModel) -> None:
        """Copy `base`, before PEFT wraps it."""
        self.model = copy.deepcopy(base).eval()
        for parameter in self.model.parameters():
            parameter.requires_grad_(False)

    def refresh(self, adapted: PeftModel) -> PreTrainedModel:
        """Take over the adapter's present values."""
        for name, weight in merged(adapted):
            self.model.get_parameter(name).copy_(weight)
        return self.model
