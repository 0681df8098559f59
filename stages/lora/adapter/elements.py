"""Training of chosen LoRA elements, exactly, in any trainer: `sparsify` before it trains, `densify` after.

In between the active elements are the model's only LoRA parameters, so that no weight decay, momentum or
clipping moves another one, and gradients and optimizer states exist for the active ones alone.
"""

from __future__ import annotations

from torch import Tensor, nn

from stages.errors import ArtifactError
from stages.lora.adapter.adapter import full_mask, lora_layers
from stages.lora.adapter.sparse_linear import SparseLinear

ADAPTER_NAME = "default"
"""PEFT's name of an adapter that was given none."""


def sparsify(model: nn.Module, active: dict[str, Tensor]) -> None:
    """Replace every LoRA layer of a PEFT model by one in which only the active elements are parameters.

    active: bool masks by the names of an adapter file (`lora_layers` lists them), each of the weight's shape
    or, for a compensated adapter, of its trainable part, the first half of the rank. Call it after building a
    trainer and before training: while it is built, TRL copies `default` to `ref` by plain parameter names.
    ArtifactError unless the masks are for exactly these weights.
    """
    layers = lora_layers(model, ADAPTER_NAME)
    if layers.keys() != active.keys():
        unmatched = sorted(layers.keys() ^ active.keys())[0]
        raise ArtifactError(f"masks do not fit the adapter: {unmatched} is on one side only")
    masks = {name: full_mask(name, active[name], layer.weight) for name, layer in layers.items()}
    for name, layer in layers.items():
        _replace(model, name, SparseLinear(layer, masks[name]))


def densify(model: nn.Module) -> None:
    """Turn every sparse layer back into a plain linear layer with the same weight, for PEFT to save."""
    for name, layer in lora_layers(model, ADAPTER_NAME).items():
        if isinstance(layer, SparseLinear):
            plain = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
            plain.weight = nn.Parameter(layer.weight.detach().clone())
            _replace(model, name, plain)


def _replace(model: nn.Module, name: str, layer: nn.Linear) -> None:
    parent = model.get_submodule(name.removesuffix(".weight"))
    assert isinstance(parent, nn.ModuleDict)
    parent[ADAPTER_NAME] = layer


pack, unpack = sparsify, densify
"""Names from before a row of several sequences was called packed, for code that has them."""
