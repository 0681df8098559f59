"""Checks that preflight and the stages make: a usable GPU, and the packages that settings name."""

from __future__ import annotations

import importlib.util

from stages.config import ModelSection, RlSection, TrainSection
from stages.errors import ConfigError
from stages.models.dtype import is_quantized
from stages.runtime import gpu


def check_model(model: ModelSection) -> None:
    """Raise ConfigError if torch cannot use the GPU, or a package that the section names is not installed."""
    if model.device == "auto" and (reason := gpu.unusable_reason()):
        raise ConfigError(
            f"torch cannot use the NVIDIA GPU of this machine: {reason}",
            f"{gpu.MEND}; or go on without it: --set model.device=cpu",
        )
    if model.load_in_4bit:
        require_package("model.load_in_4bit: bitsandbytes", "pip install 'lorapar[qlora]'", "bitsandbytes")


def check_trainable(model: ModelSection) -> None:
    """Raise ConfigError for a checkpoint that is quantized itself: adapters on it could not be merged."""
    if is_quantized(model) and not model.load_in_4bit:
        raise ConfigError(
            f"{model.name} is quantized itself: an adapter that it trains cannot be merged",
            "name the checkpoint that it was made from; if bitsandbytes made it: model.load_in_4bit=true",
        )


def check_training(section: TrainSection) -> None:
    """Raise ConfigError if a package that the section names is not installed."""
    for name in section.report_to:
        require_package(f"report_to: {name}", f"pip install {name}", name)
    if isinstance(section, RlSection) and (engine := section.rollouts.engine) != "transformers":
        hint = "pip install 'lorapar[vllm]', or rl.rollouts.engine=transformers"
        require_package(f"rl.rollouts.engine {engine}: vllm", hint, "vllm")


def require_package(subject: str, hint: str, *packages: str) -> None:
    """Raise ConfigError unless one of the packages is installed."""
    if not any(map(importlib.util.find_spec, packages)):
        raise ConfigError(f"{subject} is not installed", hint)
