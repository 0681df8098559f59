"""LoRA adapters of which chosen elements train.

For notebooks: `from stages.lora import densify, lora_layers, read_masks, sparsify`.
"""

from importlib import import_module
from typing import Any

_HOMES = {
    "densify": "adapter.elements",
    "lora_layers": "adapter.adapter",
    "read_masks": "importance.masks",
    "sparsify": "adapter.elements",
}


def __getattr__(name: str) -> Any:
    # Torch and PEFT are loaded for who asks for one of these, and not with every module of this package.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"stages.lora.{_HOMES[name]}"), name)
