"""Errors of loading a model, in one line that names it, and checks of its config, files and packages."""

import errno
import importlib.util
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from stages.config import ModelSection, RlSection, TrainSection
from stages.errors import (
    HUB_HINT,
    ConfigError,
    DataError,
    LoraparError,
    MissingInputError,
    first_line,
    is_out_of_memory,
    is_rust_panic,
    sought,
)
from stages.runtime import gpu
from stages.runtime.libraries import offline_without_network

MACHINE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.ENOMEM)
"""Errors of this machine, not of the files."""
CHANGED = "the folder may be incomplete or of another kind: compare it with where it came from"


@contextmanager
def load_errors(subject: str, model: ModelSection) -> Iterator[None]:
    """Turn what a library raises inside the context into MissingInputError or DataError.

    subject: what is loaded, as in "cannot load SUBJECT NAME". Errors of this machine, such as a lack of
    memory, pass through.
    """
    if not Path(model.name).exists() and not model.may_be_on_hub:
        raise MissingInputError(f"no model folder {sought(model.name)}", "a hub id is NAME or OWNER/NAME")
    if not Path(model.name).exists():
        offline_without_network()
    try:
        yield
    except LoraparError:
        raise
    except BaseException as error:
        if not (isinstance(error, Exception) or is_rust_panic(error)):
            raise
        if is_out_of_memory(error) or (isinstance(error, OSError) and error.errno in MACHINE_ERRORS):
            raise
        reason = first_line(error)
        if "ignore_mismatched_sizes" in str(error):  # the library's advice is to take random weights
            reason = "its weights have other shapes than its config says"
        problem = f"cannot load {subject} {model.name}"
        if isinstance(error, OSError | ImportError | ValueError):
            on_hub = isinstance(error, OSError) and not Path(model.name).exists()
            raise MissingInputError(f"{problem}: {reason}", HUB_HINT if on_hub else None) from None
        raise DataError(f"{problem}: {type(error).__name__}: {reason}", CHANGED) from None


def load_config(model: ModelSection) -> Any:
    """Load the model's config, as transformers' class for its architecture."""
    from transformers import AutoConfig

    with load_errors("model", model):
        return AutoConfig.from_pretrained(model.name, revision=model.revision)


def is_quantized(model: ModelSection) -> bool:
    """True if the checkpoint itself is quantized (GPTQ, AWQ, fp8); False if it cannot be read."""
    try:
        return getattr(load_config(model), "quantization_config", None) is not None
    except LoraparError:
        return False


def max_positions(config: Any) -> int | None:
    """Return the context length in tokens; None if the config does not say, or stretches its positions."""
    text_config = config.get_text_config()
    rope = getattr(text_config, "rope_parameters", None) or getattr(text_config, "rope_scaling", None) or {}
    if rope.get("rope_type", "default") != "default":
        return None
    length = getattr(text_config, "max_position_embeddings", None)
    return int(length) if length else None


def check_no_missing_weights(model: ModelSection, missing: Iterable[str]) -> None:
    """Raise DataError if parameters of the model have no weights in its files: they would be random."""
    names = sorted(missing)
    if names:
        others = f" and {len(names) - 1} others" if names[1:] else ""
        raise DataError(f"model {model.name} has no weights for {names[0]}{others}", CHANGED)


def check_finite(model: ModelSection) -> None:
    """Raise DataError if the first row of a weight in a model's folder, or a vector, has NaN or infinity."""
    from safetensors import safe_open

    for file in sorted(Path(model.name).glob("*.safetensors")):
        with load_errors("model", model), safe_open(file, "pt") as weights:
            for name in weights.keys():  # noqa: SIM118, it is no mapping
                weight = weights.get_slice(name)
                row = weight[:1] if len(weight.get_shape()) > 1 else weights.get_tensor(name)
                if row.is_floating_point() and not row.float().isfinite().all():
                    raise DataError(f"model {model.name}: {name} has values that are no numbers", CHANGED)


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
