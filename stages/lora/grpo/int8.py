"""Rollouts in 8 bits on a CPU: several times as fast as in float32, corrected for what they change.

Each linear layer multiplies 8-bit integers: weights scaled by output, activations by token, as one large
activation would take the precision of all other tokens. What the sampler then writes differs a little from
what the policy would write. So each token's loss is weighted by the policy's probability over the sampler's,
cut at a limit: truncated importance sampling, as TRL has it for vLLM, and FlashRL for quantized rollouts.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from stages.packing import support

INSTRUCTIONS = ("avx512_vnni", "avx_vnni", "amx_int8")
"""CPU features that multiply 8-bit integers, as torch names them; without one the gain is small."""
LARGEST = 127
"""The largest magnitude of a quantized weight or activation."""
TINY = 1e-12
"""In place of a scale of 0."""
CORRECTION_MAX = 3.0
"""Ratio of the policy's probability to the sampler's above which the correction cuts or masks."""


def is_supported(model: nn.Module) -> bool:
    """Whether a model computes in float32 on a CPU that multiplies 8-bit integers; bfloat16 is as fast."""
    weight, features = next(model.parameters()), torch.cpu.get_capabilities()
    in_float32 = weight.device.type == "cpu" and weight.dtype == torch.float32
    return in_float32 and any(features.get(name) for name in INSTRUCTIONS)


class _Product:
    """The forward pass of a linear layer, in 8 bits: y = s_x · s_w · (q_x q_wᵀ) + bias."""

    def __init__(self, layer: nn.Linear) -> None:
        weight = layer.weight.detach()  # (out, in)
        scales = weight.abs().amax(1).clamp_(min=TINY) / LARGEST  # (out,)
        quantized = (weight / scales[:, None]).round_().to(torch.int8)
        self.packed = torch.ops.onednn.qlinear_prepack(quantized, None)
        self.bias = layer.bias
        # The activations' step of largest / LARGEST is divided between here and `__call__`.
        self.scales, self.zeros = scales / LARGEST, torch.zeros(len(weight), dtype=torch.int32)

    def __call__(self, x: Tensor) -> Tensor:
        # (…, in) → (…, out)
        largest = x.abs().amax(-1, keepdim=True).clamp_(min=TINY)  # (…, 1), of each token
        # The kernel takes activations without a sign: 128 stands for 0. `to` cuts off what follows the point.
        quantized = (x * (LARGEST / largest)).add_(128.5).to(torch.uint8)
        product = torch.ops.onednn.qlinear_pointwise(
            quantized, 1.0, 128, self.packed, self.scales, self.zeros, None,
            1.0, 0, torch.float32, "none", [], "",
        )  # fmt: skip
        product.mul_(largest)
        return product if self.bias is None else product.add_(self.bias)


@contextmanager
def linear_layers_in_int8(model: nn.Module, ids: list[int]) -> Iterator[None]:
    """Context in which all linear layers of a model compute in 8 bits; no weight changes.

    ids: real tokens, for `support.supports_packing`, which compares passes more closely than 8 bits allow.
    """
    support.supports_packing(model, ids)
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    for layer in layers:
        layer.forward = _Product(layer)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward
