"""Training of chosen LoRA elements, exactly, in any trainer: `sparsify` before it trains, `densify` after.

In between the active elements are the model's only LoRA parameters: a vector for each layer, from which its
dense weight is built. So no weight decay, momentum, clipping or distributed wrapper moves another element,
and gradients and optimizer states exist for the active ones alone. A gradient mask would not be enough:
AdamW's weight decay moves elements of zero gradient.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stages.errors import ArtifactError
from stages.lora.adapter.adapter import full_mask, lora_layers

ADAPTER_NAME = "default"
"""PEFT's name of an adapter that was given none."""


def sparsify(model: nn.Module, active: dict[str, Tensor], compensated: bool = False) -> None:
    """Replace every LoRA layer of a PEFT model by one in which only the active elements are parameters.

    active: bool masks by the names of an adapter file (`lora_layers` lists them), each of the weight's shape.
    compensated: masks may be of the trainable part of a compensated adapter, the first half of its rank. Call
    it after building a trainer and before training: while it is built, TRL copies `default` to `ref` by plain
    parameter names. An optimizer that was made before, and made no step yet, trains the active elements.
    ArtifactError, with the model as it was, unless the masks are for these very weights and no other part of
    an adapter trains.
    """
    layers = lora_layers(model, ADAPTER_NAME)
    if layers.keys() != active.keys():
        unmatched = sorted(layers.keys() ^ active.keys())[0]
        raise ArtifactError(f"masks do not fit the adapter: {unmatched} is on one side only")
    masks = {name: full_mask(name, active[name], layer.weight, compensated) for name, layer in layers.items()}
    _refuse_what_masks_miss(model, layers)
    sparse = {name: SparseLinear(layer, masks[name]) for name, layer in layers.items()}
    for name, layer in sparse.items():
        layer.take_over(layers[name].weight)
        _replace(model, name, layer)


def _refuse_what_masks_miss(model: nn.Module, layers: dict[str, nn.Linear]) -> None:
    """ArtifactError if part of an adapter would train whole: an embedding's, a magnitude, a second adapter's.

    Heads in `modules_to_save` are the caller's own and may train.
    """
    weights = {id(layer.weight) for layer in layers.values()}
    modules = set(layers.values())
    uses = sum(module in modules for _, module in model.named_modules(remove_duplicate=False))
    if len(weights) < len(layers) or uses > len(layers):
        raise ArtifactError("two layers share LoRA weights, and each mask is for a layer of its own")
    for name, parameter in model.named_parameters():
        of_adapter = "lora_" in name or "trainable_tokens" in name
        if of_adapter and parameter.requires_grad and id(parameter) not in weights:
            hint = "chosen elements are those of the matrices A and B of one plain LoRA adapter named default"
            raise ArtifactError(f"{name} trains, and no mask is for it", hint)


def densify(model: nn.Module) -> None:
    """Turn every sparse layer back into a plain linear layer with the same weight, for PEFT to save."""
    for name, layer in sparse_layers(model).items():
        plain = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
        plain.weight = nn.Parameter(layer.weight.detach().clone())
        _replace(model, name, plain)


def sparse_layers(model: nn.Module) -> dict[str, SparseLinear]:
    """The layers of a partition, of which some elements train; none for a baseline, which trains whole."""
    layers = lora_layers(model)  # DoRA has such layers, too, beside its magnitudes
    return {name: layer for name, layer in layers.items() if isinstance(layer, SparseLinear)}


def _replace(model: nn.Module, name: str, layer: nn.Linear) -> None:
    parent = model.get_submodule(name.removesuffix(".weight"))
    assert isinstance(parent, nn.ModuleDict)
    parent[ADAPTER_NAME] = layer


class SparseLinear(nn.Linear):
    """A bias-free linear layer of which only the elements under `mask` train.

    State dicts hold the dense `weight` under its plain name, so PEFT and Trainer save and load it like any
    linear layer. Loading a weight whose frozen elements differ is an error.
    """

    values: Tensor
    """(active,): the active elements in the order of the flattened weight; a parameter unless it is empty."""

    def __init__(self, linear: nn.Linear, mask: Tensor) -> None:
        """Take over the weight of `linear`; mask: bool, of the weight's shape, True for active elements."""
        nn.Module.__init__(self)  # Linear's __init__ would register a `weight` parameter
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_parameter("bias", None)
        # Plain attributes, not buffers: DDP would broadcast buffers in every forward pass.
        self._dense = linear.weight.detach().clone(memory_format=torch.contiguous_format)  # (out, in)
        index = mask.to(self._dense.device).flatten().nonzero().squeeze(1)  # (active,)
        # int32 takes half the bytes of int64, and there is one index for each value.
        self._index = index.to(torch.int32) if mask.numel() <= torch.iinfo(torch.int32).max else index
        values = self._dense.view(-1)[index].clone()
        if len(values):
            self.values = nn.Parameter(values)
        else:
            # Not a parameter: TRL's set_adapter makes every parameter trainable.
            self.register_buffer("values", values, persistent=False)
        # The active elements of `_dense` go stale. While `_fixed`, none is stale and it is used as it is.
        self._fixed = not len(values)

    def take_over(self, parameter: nn.Parameter) -> None:
        """Make `parameter` that of `values`: an optimizer that has it would else train nothing, silently."""
        if isinstance(self.values, nn.Parameter):
            parameter.grad, parameter.data = None, self.values.data
            self.values = parameter.requires_grad_(True)

    @property
    def weight(self) -> Tensor:
        """The dense weight (out, in): `_dense` with `values` written over its active elements."""
        if self._fixed:
            return self._dense
        # Rebuilt at each read: a cache could not tell that it is stale, as fused optimizers do not bump
        # `_version`. Built out of place by torch's own operators, whose backward pass gathers the gradient of
        # `values`: an autograd.Function over one buffer takes twice as long in a small layer.
        values = self.values.to(self._dense.dtype)
        return self._dense.view(-1).index_copy(0, self._index.long(), values).view_as(self._dense)

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight)

    def _apply(self, fn: Any, recurse: bool = True) -> SparseLinear:
        super()._apply(fn, recurse)
        # nn.Module moves and casts parameters and buffers; these two are neither.
        self._dense, self._index = fn(self._dense), fn(self._index)
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        destination[prefix + "weight"] = self.weight.detach().clone()

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        weight = state_dict.get(prefix + "weight")
        if weight is None:
            missing_keys.append(prefix + "weight")
            return
        if weight.shape != self._dense.shape:
            error_msgs.append(
                f"{prefix}weight has shape {tuple(weight.shape)}, expected {tuple(self._dense.shape)}"
            )
            return
        weight = weight.to(self._dense)
        # Only active elements can be stored, so all others must be equal already.
        frozen = torch.ones(weight.numel(), dtype=torch.bool, device=weight.device)  # (out · in,)
        frozen[self._index.long()] = False
        if not torch.equal(weight.view(-1)[frozen], self._dense.view(-1)[frozen]):
            error_msgs.append(f"{prefix}weight differs in frozen elements")
            return
        with torch.no_grad():
            self.values.copy_(weight.view(-1).index_select(0, self._index))


@contextmanager
def frozen_weights(model: nn.Module) -> Iterator[None]:
    """Context in which every sparse layer builds its weight once, for sampling, which reads it at each token.

    Nothing may train meanwhile.
    """
    layers = [m for m in model.modules() if isinstance(m, SparseLinear) and not m._fixed]
    for layer in layers:
        layer._dense = layer.weight.detach()
        layer._fixed = True
    try:
        yield
    finally:
        for layer in layers:
            layer._fixed = False
