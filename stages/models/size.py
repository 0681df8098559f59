"""Sizes of a model from its config alone: its parameters, and the keys and values of a token."""

import json
from pathlib import Path
from typing import Any

from stages.config import ModelSection
from stages.runtime.libraries import offline_without_network


def parameters(model: ModelSection) -> int | None:
    """Estimate a model's parameters from its width, depth and vocabulary; None if its config does not say.

    vocabulary · width + layers · (4 · width² + 3 · width · inner): embeddings, attention, and a gated MLP.
    None for a mixture of experts, too.
    """
    config = _config(model)
    config = config.get("text_config") or config
    vocabulary, width = _number(config, "vocab_size"), _number(config, "hidden_size", "n_embd", "d_model")
    layers = _number(config, "num_hidden_layers", "n_layer", "num_layers")
    is_mixture = any("experts" in name and number for name, number in config.items())
    if is_mixture or not vocabulary * width * layers:
        return None
    inner = _number(config, "intermediate_size") or 4 * width
    return vocabulary * width + layers * (4 * width**2 + 3 * width * inner)


def kv_cache_bytes(config: Any, itemsize: int) -> int:
    """Bytes of the keys and values of one token.

    config: transformers' config of a text model. itemsize: bytes of a number.
    """
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(2 * config.num_hidden_layers * heads * width * itemsize)


def _number(config: dict[str, Any], *names: str) -> int:
    """The first whole number under one of these names, of which architectures have several; else 0."""
    return next((config[name] for name in names if isinstance(config.get(name), int)), 0)


def _config(model: ModelSection) -> dict[str, Any]:
    """The model's config.json; empty if there is none, or the hub cannot be asked for it."""
    file: Path | str = Path(model.name) / "config.json"
    try:
        if not Path(file).is_file():
            from huggingface_hub import hf_hub_download

            offline_without_network()
            file = hf_hub_download(model.name, "config.json", revision=model.revision)
        return dict(json.loads(Path(file).read_text(encoding="utf-8")))
    except Exception:  # whatever is wrong with the model is said where it is loaded
        return {}
