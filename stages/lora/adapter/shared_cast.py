"""One cast of an input for all LoRA layers that read it: q, k and v have one, and so have gate and up.

PEFT casts a 16-bit input to the 32 bits of the adapter in each layer, and autograd keeps every copy for the
gradient of A: two thirds of those of attention, and half of those of the MLP's width, hold the same numbers.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.weak import TensorWeakRef


class SharedCast:
    """Stands in for `_cast_input_dtype` of PEFT's layers, and gives the last cast again for the same input.

    It keeps neither alive: a cast lives as long as autograd, or a layer, needs it.
    """

    def __init__(self) -> None:
        self._input: TensorWeakRef | None = None
        self._cast: TensorWeakRef | None = None

    def __call__(self, x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        if x is None or x.dtype == dtype:
            return x
        last = self._last(x)
        # A cast that was made without a gradient gives none.
        if last is not None and last.dtype == dtype and last.requires_grad == self._needs_grad(x):
            return last
        cast = x.to(dtype)
        self._input, self._cast = TensorWeakRef(x), TensorWeakRef(cast)
        return cast

    def __reduce__(self) -> tuple[type[SharedCast], tuple[()]]:
        return SharedCast, ()  # weak references cannot be copied

    def _last(self, x: Tensor) -> Tensor | None:
        if self._input is None or self._cast is None or self._input() is not x:
            return None
        return self._cast()  # type: ignore[no-any-return]

    @staticmethod
    def _needs_grad(x: Tensor) -> bool:
        return x.requires_grad and torch.is_grad_enabled()


def share_casts(model: nn.Module) -> None:
    """Let all LoRA layers of a model cast by one `SharedCast`."""
    from peft.tuners.lora import LoraLayer

    shared = SharedCast()
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module._cast_input_dtype = shared  # type: ignore[assignment, method-assign]
