"""Weights with the adapter merged in, for sampling: on CPU they are several times faster than LoRA layers.

Each merged weight is computed from the untouched base weight. TRL, to send weights to vLLM, adds the adapter
to the base weight in place and subtracts it again, so that rounding makes the base weight drift.
"""

import copy
from collections.abc import Iterator
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from stages.lora.adapter.adapter import lora_layers

ADAPTED = "base_model.model."
"""Prefix that PEFT gives the name of every module of the base."""


def adapted_weights(adapted: PeftModel) -> dict[str, Any]:
    """Map the name of each weight with an adapter, as in the plain model, to PEFT's LoRA layer around it."""
    suffix = ".lora_A.weight"
    paths = [name.removesuffix(suffix) for name in lora_layers(adapted) if name.endswith(suffix)]
    return {f"{path.removeprefix(ADAPTED)}.weight": adapted.get_submodule(path) for path in paths}


@torch.no_grad()
def merge(layer: Any) -> Tensor:
    """Compute W + scaling · B A of one of PEFT's LoRA layers, in the dtype of W."""
    weight = layer.base_layer.weight  # (out, in)
    # The sum is taken in float32 and rounded once.
    return (weight.float() + layer.get_delta_weight("default")).to(weight.dtype)


def merged_parameters(adapted: PeftModel) -> Iterator[tuple[str, Tensor]]:
    """Yield name and value of every parameter of the merged model, a plain model without PEFT's wrapper.

    Tied parameters come once. Only one merged weight exists at a time: all of them would be a second model.
    """
    layers = adapted_weights(adapted)
    for name, parameter in adapted.named_parameters():
        name = name.removeprefix(ADAPTED).replace(".base_layer", "")
        if adapted.prefix not in name:
            yield name, merge(layers.pop(name)) if name in layers else parameter.detach()
    assert not layers, sorted(layers)


class MergedCopy:
    """A copy of the base, `model`, that holds the merged weights as of the last `refresh`.

    Its outputs are those of the adapted model up to the rounding of its dtype.
    """

    def __init__(self, base: PreTrainedModel) -> None:
        """Copy `base`, which PEFT must not have wrapped yet."""
        self.model = copy.deepcopy(base).eval()
        for parameter in self.model.parameters():
            parameter.requires_grad_(False)

    @torch.no_grad()
    def refresh(self, adapted: PeftModel) -> PreTrainedModel:
        """Merge the adapter's current values into the copy, and return it."""
        for name, layer in adapted_weights(adapted).items():
            self.model.get_parameter(name).copy_(merge(layer))
        return self.model
