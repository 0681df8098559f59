"""One cast of an input for all LoRA layers that read it: q, k and v read the same one, and gate and up do.

PEFT casts a 16-bit input to the adapter's 32 bits in each layer, and autograd keeps every cast for the
gradient of A. Of the three casts for q, k and v two are redundant; of the two for gate and up, one.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.utils.weak import TensorWeakRef


class SharedCast:
    """Stands in for `_cast_input_dtype` of PEFT's layers, and gives the last cast again for the same input.

    It keeps neither alive: a cast lives as long as autograd, or a layer, needs it.
    """

    def __init__(self) -> None:
        self._input: Callable[[], Tensor | None] = lambda: None
        self._cast = self._input

    def __call__(self, x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        if x is None or x.dtype == dtype:
            return x
        last = self._cast() if self._input() is x else None
        # Reuse a cast only if it serves autograd alike: one that was made without a gradient passes none on.
        needs_grad = x.requires_grad and torch.is_grad_enabled()
        if last is not None and last.dtype == dtype and last.requires_grad == needs_grad:
            return last
        cast = x.to(dtype)
        self._input, self._cast = TensorWeakRef(x), TensorWeakRef(cast)
        return cast

    def __reduce__(self) -> tuple[type[SharedCast], tuple[()]]:
        return SharedCast, ()  # weak references cannot be copied


def share_casts(model: nn.Module) -> None:
    """Let all LoRA layers of a model cast by one `SharedCast`."""
    shared = SharedCast()
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module._cast_input_dtype = shared
