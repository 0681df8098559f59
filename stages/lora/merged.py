"""A plain copy of the base model with the adapter merged in, for generation: several times faster than LoRA layers on CPU.

The base weights themselves are never touched: merging into and out of them drifts.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch
from torch import nn

from stages.lora.adapter import lora_layers

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


class MergedCopy:
    """`copy.model` answers like the adapted model did at the last `refresh`, to the rounding of its type."""

    def __init__(self, base: PreTrainedModel) -> None:
        """Copy `base`, before PEFT wraps it."""
        self.model = copy.deepcopy(base).eval()
        for parameter in self.model.parameters():
            parameter.requires_grad_(False)

    @torch.no_grad()
    def refresh(self, adapted: PeftModel) -> PreTrainedModel:
        """Take over the adapter's present values: W + scaling · B A, each computed from the untouched base weight."""
        layers = lora_layers(adapted)
        for name in layers:
            if not name.endswith(".lora_A.weight"):
                continue
            path = name.removesuffix(".lora_A.weight")
            wrapped = adapted.get_submodule(path)
            target = self.model.get_submodule(path.removeprefix("base_model.model."))
            assert isinstance(target, nn.Linear)
            a, b = layers[name].weight.float(), layers[f"{path}.lora_B.weight"].weight.float()
            merged = wrapped.base_layer.weight.float() + wrapped.scaling["default"] * (b @ a)
            target.weight.copy_(merged)
        return self.model
