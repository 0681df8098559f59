"""PEFT methods to compare with: those of the paper's comparison and a few others, as PEFT implements them.

All their parameters are trained: no element is scored, masked or frozen.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import (
    IA3Config,
    LoraConfig,
    MissConfig,
    PeftConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    RandLoraConfig,
    ShiraConfig,
    VeraConfig,
)
from safetensors.torch import save_file

from stages.config import BaselineSection, LoraSection
from stages.errors import ArtifactError, ConfigError
from stages.lora.adapter import adapter
from stages.models.base import with_adapter

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

STATE = "trained.safetensors"
"""File with every trained parameter.

For a prompt encoder, PEFT's own file has only the prompt that the encoder computes, and training cannot
continue from that.
"""

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
    if baseline.method == "ia3":
        return IA3Config(task_type="CAUSAL_LM")
    if not baseline.trains_prompt:
        return _module_config(baseline, adapter.with_targets(base, lora), seed, dropout)
    tokens = baseline.virtual_tokens
    if baseline.method == "p_tuning":
        # With an encoder_hidden of None PEFT takes the model's width.
        return PromptEncoderConfig(
            task_type="CAUSAL_LM", num_virtual_tokens=tokens, encoder_hidden_size=baseline.encoder_hidden
        )  # type: ignore[arg-type]
    config_class = {"prompt_tuning": PromptTuningConfig, "prefix_tuning": PrefixTuningConfig}[baseline.method]
    return config_class(task_type="CAUSAL_LM", num_virtual_tokens=tokens)


def _module_config(baseline: BaselineSection, lora: LoraSection, seed: int, dropout: float) -> PeftConfig:
    """PEFT config of a method that changes the target modules of `lora`."""
    common = {"task_type": "CAUSAL_LM", "target_modules": list(lora.target_modules)}
    rank = baseline.rank or lora.r
    if baseline.method == "dora":
        alpha: Any = lora.lora_alpha
        return LoraConfig(
            r=rank,
            lora_alpha=alpha,
            lora_dropout=dropout,
            use_rslora=lora.use_rslora,
            use_dora=True,
            **common,
        )
    if baseline.method == "vera":
        # STATE has no frozen parameters: the random matrices are generated again from the same seed.
        return VeraConfig(
            r=baseline.rank or VERA_RANK, projection_prng_key=seed, vera_dropout=dropout, **common
        )
    if baseline.method == "randlora":
        return RandLoraConfig(
            r=rank,
            randlora_alpha=RANDLORA_ALPHA * rank,
            projection_prng_key=seed,
            randlora_dropout=dropout,
            **common,
        )
    if baseline.method == "shira":
        # The seed chooses the sparse set of weights that it trains.
        return ShiraConfig(r=rank, random_seed=seed, **common)
    return MissConfig(r=rank, miss_dropout=dropout, **common)


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
