"""The dtype in which a model is loaded, and what `model.dtype: auto` means here.

On a CPU without instructions for bfloat16 torch multiplies it a hundred times slower than float32, so `auto`
is float32 there. The dtype is part of the keys of votes, answers and checkpoints. It is not part of an
artifact's cache key, so an artifact made on another machine stays current.
"""

import functools
from typing import Any

from stages.config import ModelSection
from stages.errors import LoraparError
from stages.models.load_errors import is_quantized, load_config

NATIVE = ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16")
"""CPU features that multiply bfloat16 natively, as torch names them.

With AVX-512 alone bfloat16 is emulated, at 0.4 of float32's speed.
"""


def resolve(model: ModelSection) -> str:
    """Return the dtype of the base weights: `model.dtype` or, for `auto`, the checkpoint's if native here.

    It is `float32` or `bfloat16`; with a GPU also `auto`, if the checkpoint has no dtype. On a CPU that does
    not multiply the checkpoint's dtype natively, `auto` means float32. A checkpoint's float16 becomes
    bfloat16 on a GPU that has it, else float32: small gradients vanish in float16, and nothing here scales
    the loss.
    """
    return model.dtype if model.dtype != "auto" else _auto(model.name, model.revision)


@functools.cache
def _auto(name: str, revision: str) -> str:
    import torch

    try:
        checkpoint = load_config(ModelSection(name=name, revision=revision)).dtype
    except LoraparError:
        if torch.cuda.is_available():
            return "auto"  # a voter's server may know how to read it; if nobody does, loading says so
        raise
    stored = "auto" if checkpoint is None else str(checkpoint).removeprefix("torch.")
    if torch.cuda.is_available():
        if stored != "float16":
            return stored
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    return "bfloat16" if stored == "bfloat16" and native_bfloat16() else "float32"


def answer_dtype(model: ModelSection, engine: str) -> str:
    """Return the precision in which an engine here computes its answers, for the key of their journal.

    It is the dtype of the base weights and, where vLLM's head has another by default, that of the head. A
    `head_dtype` of a user's own is in the key as an argument of the server.
    """
    weights = resolve(model)
    head = weights != "float32" and engine == "vllm" and has_float32_head(model)
    return f"{weights}, head float32" if head else weights


def has_float32_head(model: ModelSection) -> bool:
    """True if a vLLM server here computes the model's logits in float32, whatever the dtype of its weights.

    In bfloat16, 96 votes of one model had 6 values. CUDA adds up products of 16-bit numbers in float32
    without a copy of the head; a CPU would need one. vLLM refuses it for a quantized head, which a quantized
    checkpoint may have.
    """
    import torch

    return torch.cuda.is_available() and not is_quantized(model)


def native_bfloat16() -> bool:
    """True if this CPU has bfloat16 instructions and oneDNN may use them (ONEDNN_MAX_CPU_ISA)."""
    import torch

    # Both are needed: oneDNN also says yes if it emulates, and the CPU does not know of a limit for oneDNN.
    allowed = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)()
    features: dict[str, Any] = torch.cpu.get_capabilities()
    return bool(allowed) and any(features.get(name) for name in NATIVE)
