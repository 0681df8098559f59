"""PEFT methods to compare with: those of the paper's comparison and a few others, as PEFT implements them.

All their parameters are trained: no element is scored, masked or frozen.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import (
    IA3Config,
    LoraConfig,
    MissConfig,
    PeftConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    RandLoraConfig,
    ShiraConfig,
    VeraConfig,
)
from safetensors.torch import save_file
from transformers import PreTrainedModel

from stages.config import BaselineSection, LoraSection
from stages.errors import ArtifactError, ConfigError
from stages.lora.adapter import adapter
from stages.models.base import with_adapter

STATE = "trained.safetensors"
"""File with every trained parameter.

For a prompt encoder, PEFT's own file has only the prompt that the encoder computes, and training cannot
continue from that.
"""

PROMPTS = {
    "prompt_tuning": PromptTuningConfig,
    "p_tuning": PromptEncoderConfig,
    "prefix_tuning": PrefixTuningConfig,
}
"""PEFT's configs of the methods that train a prompt."""
RANDLORA_ALPHA = 20
"""RandLoRA's alpha divided by its rank, as PEFT recommends. PEFT's default alpha suits rank 32 only."""
VERA_RANK = 256
"""Default rank of VeRA, from its paper (arXiv 2310.11454): it trains two vectors per module at any rank."""


def attach(
    base: PreTrainedModel,
    baseline: BaselineSection,
    lora: LoraSection,
    seed: int,
    folder: Path | None,
    dropout: float = 0.0,
) -> PeftModel:
    """Put a new adapter, initialised from the seed, on `base`, or the one that `save` wrote into `folder`.

    dropout: dropout probability of the adapter's input, for the methods that have one in PEFT.
    """
    torch.manual_seed(seed)
    try:
        model = with_adapter(base, _config(base, baseline, lora, seed, dropout))
    except ValueError as error:
        raise ConfigError(f"baseline.method {baseline.method}: {error}") from None
    if folder is not None:
        load(model, folder)
    return model  # type: ignore[return-value]


def _config(
    base: PreTrainedModel, baseline: BaselineSection, lora: LoraSection, seed: int, dropout: float
) -> PeftConfig:
    method = baseline.method
    options: dict[str, Any] = {"task_type": "CAUSAL_LM"}
    if method == "ia3":
        return IA3Config(**options)
    if baseline.trains_prompt:
        # An encoder of width None is as wide as the model.
        encoder = {"encoder_hidden_size": baseline.encoder_hidden} if method == "p_tuning" else {}
        return PROMPTS[method](**options, num_virtual_tokens=baseline.virtual_tokens, **encoder)
    lora = adapter.with_targets(base, lora)
    rank = baseline.rank or (VERA_RANK if method == "vera" else lora.r)
    options |= {"target_modules": list(lora.target_modules), "r": rank}
    if method == "dora":
        options |= {"lora_alpha": lora.lora_alpha, "use_rslora": lora.use_rslora, "use_dora": True}
        return LoraConfig(**options, lora_dropout=dropout)
    if method == "miss":
        return MissConfig(**options, miss_dropout=dropout)
    # Neither STATE nor PEFT's file has the random matrices of VeRA and RandLoRA, nor SHiRA's choice of
    # weights: each is generated again from the same seed.
    if method == "shira":
        return ShiraConfig(**options, random_seed=seed)
    options |= {"projection_prng_key": seed, f"{method}_dropout": dropout}
    if method == "vera":
        return VeraConfig(**options)
    return RandLoraConfig(**options, randlora_alpha=RANDLORA_ALPHA * rank)


def save(model: PeftModel, folder: Path) -> None:
    """Write every trained parameter into `folder`, in the file STATE."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {n: p.detach().cpu().contiguous() for n, p in adapter.trained_parameters(model).items()},
        folder / STATE,
    )


def load(model: PeftModel, folder: Path) -> None:
    """Load what `save` wrote into the model; ArtifactError unless every name and shape fits."""
    stored, parameters = adapter.read(folder, STATE), adapter.trained_parameters(model)
    if {n: p.shape for n, p in stored.items()} != {n: p.shape for n, p in parameters.items()}:
        raise ArtifactError(f"{folder} does not fit the model: it was made for another base or baseline")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(stored[name])
