"""Rewrites LoRA weights whose products nearly cancel, before a server rounds them to 16 bits.

A compensated adapter, A = [A; A₀] and B = [B, −B₀], holds two large products, and training changed only their
difference. Rounding to bfloat16 gives each an error of about 1/500 of its own size, which may exceed that
difference.
"""

import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

FILE = "adapter_model.safetensors"


def rewrite(folder: Path, out: Path) -> Path:
    """Write the adapter in `folder` into `out` with smaller weights of the same products, if there are any.

    Returns `out`, or `folder` if nothing changes. With the rank in two halves, A = [A₁; A₂] and B = [B₁, B₂],
    the product is B₁A₁ + B₂A₂ = (B₁ + B₂)A₁ + B₂(A₂ − A₁). For a compensated adapter that is
    (B − B₀)A + B₀(A − A₀): both terms are as small as what training changed. For others the terms would grow.
    """
    weights = load_file(folder / FILE)
    changed: dict[str, Tensor] = {}
    for name, a in weights.items():
        b = weights.get(name.replace(".lora_A.", ".lora_B."))
        if ".lora_A." not in name or b is None or len(a) % 2:
            continue
        (a1, a2), (b1, b2) = a.float().chunk(2), b.float().chunk(2, dim=1)
        before, after = ((a1, b1), (a2, b2)), ((a1, b1 + b2), (a2 - a1, b2))
        # Rounding errors are relative to the factors, so these sums bound the products' up to a constant.
        if sum(a.norm() * b.norm() for a, b in after) < sum(a.norm() * b.norm() for a, b in before):
            (a1, b1), (a2, b2) = after
            changed[name] = torch.cat([a1, a2])
            changed[name.replace(".lora_A.", ".lora_B.")] = torch.cat([b1, b2], dim=1)
    if not changed:
        return folder
    if folder != out:
        out.mkdir()
        shutil.copy(folder / "adapter_config.json", out)
    save_file(weights | changed, out / FILE, metadata={"format": "pt"})
    return out
