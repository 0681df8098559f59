"""The PEFT methods of the paper's comparison, as PEFT implements them.

All their parameters are trained: no element is scored, masked or frozen.
"""

from pathlib import Path

import torch
from peft import IA3Config, PeftConfig, PeftModel, PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig
from safetensors.torch import save_file
from transformers import PreTrainedModel

from stages.config import BaselineSection
from stages.errors import ArtifactError
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
VIRTUAL_TOKENS = 20
"""Length of the trained prompt or prefix."""


def attach(base: PreTrainedModel, baseline: BaselineSection, seed: int, folder: Path | None) -> PeftModel:
    """Put a new adapter, initialised from the seed, on `base`, or the one that `save` wrote into `folder`."""
    torch.manual_seed(seed)
    if baseline.method == "ia3":
        config: PeftConfig = IA3Config(task_type="CAUSAL_LM")
    else:
        config = PROMPTS[baseline.method](task_type="CAUSAL_LM", num_virtual_tokens=VIRTUAL_TOKENS)
    model = with_adapter(base, config, f"baseline.method {baseline.method}")
    if folder is not None:
        load(model, folder)
    return model


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
