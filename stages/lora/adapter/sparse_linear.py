"""Linear layers of which single elements are frozen.

Their only parameter is a vector of the active elements, and the dense weight is built from it. A frozen
element is not part of any parameter, so weight decay, momentum, clipping or a distributed wrapper cannot move
it. A gradient mask would not be enough: AdamW's weight decay moves elements of zero gradient.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


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
        if linear.bias is not None or mask.shape != linear.weight.shape:
            raise ValueError(
                f"mask {tuple(mask.shape)} does not fit weight {tuple(linear.weight.shape)} without bias"
            )
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_parameter("bias", None)
        # Plain attributes, not buffers: DDP would broadcast buffers in every forward pass.
        self._dense = linear.weight.detach().clone()  # (out, in); its active elements go stale
        index = mask.to(self._dense.device).flatten().nonzero().squeeze(1)  # (active,)
        # int32 takes half the bytes of int64, and there is one index for each value.
        self._index = index.to(torch.int32) if mask.numel() <= torch.iinfo(torch.int32).max else index
        values = self._dense.view(-1)[index].clone()
        if len(values):
            self.values = nn.Parameter(values)
        else:
            # Not a parameter: TRL's set_adapter makes every parameter trainable.
            self.register_buffer("values", values, persistent=False)
        # While True, no element of `_dense` is stale and it is used as it is.
        self._fixed = not len(values)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
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
        self, state_dict: Any, prefix: str, local_metadata: Any, strict: bool,
        missing_keys: list[str], unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
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
