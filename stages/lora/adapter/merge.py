"""Weights with the adapter merged in, for sampling: on CPU they are several times faster than LoRA layers.

Each merged weight is computed from the untouched base weight. For vLLM the library merges into the base
weight and subtracts the adapter again, and the base weight drifts.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from stages.lora.adapter.adapter import lora_layers
from stages.lora.adapter.fsdp import full_tensor

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

ADAPTED = "base_model.model."
"""What PEFT puts before the name of every module."""


def adapted_weights(adapted: PeftModel) -> dict[str, Any]:
    """For each weight with an adapter: its name in the plain model → PEFT's layer around it."""
    a = ".lora_A.weight"
    paths = [name.removesuffix(a) for name in lora_layers(adapted) if name.endswith(a)]
    return {f"{path.removeprefix(ADAPTED)}.weight": adapted.get_submodule(path) for path in paths}


@torch.no_grad()
def merge(layer: Any) -> Tensor:
    """W + scaling · B A for one of PEFT's layers, in the type of W."""
    weight = full_tensor(layer.base_layer.weight)
    return (weight.float() + layer.get_delta_weight("default")).to(weight.dtype)


def merged_parameters(adapted: PeftModel) -> Iterator[tuple[str, Tensor]]:
    """Name and value of every parameter of the plain model that answers like the adapted one.

    Tied parameters come once. Only one merged weight exists at a time: all of them would be a second model.
    """
    layers = adapted_weights(adapted)
    for name, parameter in adapted.named_parameters():
        name = name.removeprefix(ADAPTED).replace(".base_layer", "")
        if adapted.prefix not in name:
            yield name, merge(layers.pop(name)) if name in layers else full_tensor(parameter).detach()
    assert not layers, sorted(layers)


class MergedCopy:
    """`model` answers like the adapted model did at the last `refresh`, up to the rounding of its type."""

    def __init__(self, base: PreTrainedModel) -> None:
        """Copy `base`; to be called before PEFT wraps it."""
        self.model = copy.deepcopy(base).eval()
        for parameter in self.model.parameters():
            parameter.requires_grad_(False)

    @torch.no_grad()
    def refresh(self, adapted: PeftModel) -> PreTrainedModel:
        """Merge the present values of the adapter into the copy."""
        for name, layer in adapted_weights(adapted).items():
            self.model.get_parameter(name).copy_(merge(layer))
        return self.model
