"""Number of a model's parameters, from its config alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from stages.config import ModelSection

NAMES = (
    ("vocab_size",),
    ("hidden_size", "n_embd", "d_model"),
    ("num_hidden_layers", "n_layer", "num_layers"),
)
"""Names that architectures give to vocabulary, width and depth."""


def parameters(model: ModelSection) -> int | None:
    """Estimate a model's parameters from its width, depth and vocabulary; None if its config does not say.

    vocabulary · width + layers · (4 · width² + 3 · width · inner): embeddings, attention, and a gated MLP.
    Experts of a mixture are not counted.
    """
    config = _config(model)
    config = config.get("text_config", config)
    sizes = [next((int(config[name]) for name in names if config.get(name)), 0) for names in NAMES]
    if not all(sizes):
        return None
    vocabulary, width, layers = sizes
    inner = config.get("intermediate_size") or 4 * width
    return vocabulary * width + layers * (4 * width**2 + 3 * width * int(inner))


def _config(model: ModelSection) -> dict[str, Any]:
    """The model's config.json; empty if there is none, or the hub cannot be asked for it."""
    file: Path | str = Path(model.name) / "config.json"
    try:
        if not Path(file).is_file():
            from huggingface_hub import hf_hub_download, try_to_load_from_cache

            cached = try_to_load_from_cache(model.name, "config.json", revision=model.revision)
            file = (
                cached
                if isinstance(cached, str)
                else hf_hub_download(model.name, "config.json", revision=model.revision)
            )
        content = json.loads(Path(file).read_text(encoding="utf-8"))
    except Exception:  # whatever is wrong with the model is said where it is loaded
        return {}
    return content if isinstance(content, dict) else {}
