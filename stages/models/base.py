"""Loads the base model, alone or with an adapter, which stays beside the weights or is merged into them."""

import ctypes
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from stages.config import ModelSection
from stages.errors import ConfigError, first_line
from stages.models.dtype import resolve
from stages.models.load_errors import (
    check_finite,
    check_model,
    check_no_missing_weights,
    is_quantized,
    load_config,
    load_errors,
    require_package,
)
from stages.runtime import libraries, resources

PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
"""Files of a model that reads images, which vLLM needs even for text."""


def device() -> torch.device:
    """Return this process's GPU if there is one, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def load_base(model: ModelSection, target: torch.device | None = None) -> PreTrainedModel:
    """Load the base model in eval mode.

    target: by default this process's device, where a 4-bit model always goes.
    """
    dtype = resolve(model)
    if device().type == "cpu":
        _keep_freed_memory()
    options: dict[str, Any] = {"dtype": dtype}
    check_model(model)
    target = target or device()
    if model.load_in_4bit:
        options |= _four_bit(dtype)
    elif target.type != "cpu":
        # Without a map all weights are read into main memory first, by each of several processes.
        options["device_map"] = {"": target}
    loaded = _from_files(model, **options)
    if device().type == "cpu" and isinstance(head := loaded.get_output_embeddings(), nn.Linear):
        # With `logits_to_keep` the head gets a strided slice, and for that torch on CPU copies the
        # vocabulary-sized weight once per example: 31 % of a training step on SmolLM2.
        head.register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(), *inputs[1:]))
    if not model.load_in_4bit:
        loaded = loaded.to(target)
    for module in loaded.modules():
        # On CPU bitsandbytes would repack the weights at their first use in eval mode and round their scales.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    if loaded.device.type == device().type:  # elsewhere it only waits to be moved
        with load_errors("model", model):
            _run_once(loaded)
    return loaded.eval()


def _from_files(model: ModelSection, **options: Any) -> PreTrainedModel:
    """Have transformers load the base; DataError if the files lack weights."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    with load_errors("model", model):
        loaded, report = AutoModelForCausalLM.from_pretrained(
            model.name, revision=model.revision, output_loading_info=True, **_attention(model), **options
        )
        check_no_missing_weights(model, report["missing_keys"])
    return loaded


def _attention(model: ModelSection) -> dict[str, str]:
    """The argument that chooses the attention, if any; ConfigError if its package is not installed."""
    if model.attention == "flash_attention_2":  # transformers takes either package
        hint = "pip install flash-attn, or --set model.attention=auto"
        require_package("model.attention: flash_attention_2", hint, "flash_attn", "kernels")
    return {} if model.attention == "auto" else {"attn_implementation": model.attention}


def headers_only(model: ModelSection) -> PreTrainedModel:
    """Build the base model on the device `meta`; raises the error that loading its files would raise.

    It reads names and shapes (.5 s for 7 billion parameters), and of each weight the first row. A hub's files
    may not be here yet, and quantized ones need their own packages: of these the config alone is read.
    """
    if Path(model.name).is_dir() and not is_quantized(model):
        base = _from_files(model, device_map={"": "meta"})
        check_finite(model)
        return base
    return without_weights(model)


def without_weights(model: ModelSection) -> PreTrainedModel:
    """Build the base model from its config alone, on the device `meta`, where tensors have no memory."""
    from transformers import AutoModelForCausalLM

    config = load_config(model)
    with load_errors("model", model), torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, **_attention(model))


def weights_mib(model: ModelSection) -> float:
    """Memory of the base's weights when they are not in 4 bits, from its config alone."""
    dtype = resolve(model)
    itemsize = torch.float32.itemsize if dtype == "auto" else getattr(torch, dtype).itemsize
    return without_weights(model).num_parameters() * itemsize / resources.MIB


def _run_once(loaded: PreTrainedModel) -> None:
    """Run two tokens through the model in training mode, so that errors of its config show here."""
    eos = loaded.generation_config.eos_token_id if loaded.generation_config else None
    if not all(isinstance(token, int) for token in (eos if isinstance(eos, list) else [eos or 0])):
        raise TypeError(f"generation_config.json: eos_token_id is {eos!r}")
    gpus = [device()] if device().type == "cuda" else []
    with torch.random.fork_rng(devices=gpus), torch.no_grad():
        loaded.train()(input_ids=torch.tensor([[0, 1]], device=loaded.device))


def _four_bit(dtype: str) -> dict[str, Any]:
    """Return the arguments by which QLoRA (arXiv 2305.14314) loads a base model that computes in `dtype`."""
    from transformers import BitsAndBytesConfig

    compute = torch.float32 if dtype == "float32" else torch.bfloat16
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute,
    )
    return {"quantization_config": nf4, "device_map": {"": device()}}


def with_adapter(base: PreTrainedModel, config: PeftConfig, setting: str) -> PeftModel:
    """Add a new adapter to the base model: to the language model alone, if it also reads images.

    ConfigError, which names the setting, if PEFT refuses it.
    """
    path = language_model_path(base)
    if path and hasattr(config, "exclude_modules"):
        config.exclude_modules = rf"(?!{re.escape(path)}\.).*"
    elif path and hasattr(config, "target_modules"):  # VeRA and others do not exclude
        paths = (name for name, _ in base.named_modules() if name.startswith(f"{path}."))
        config.target_modules = [name for name in paths if name.rpartition(".")[2] in config.target_modules]
    # PEFT would load bitsandbytes here, also for a base that does not use it.
    with libraries.hide_packages(*libraries.UNUSED):
        try:
            return get_peft_model(base, config)
        except ValueError as error:
            raise ConfigError(f"{setting}: PEFT refuses this adapter: {first_line(error)}") from None


def language_model_path(base: PreTrainedModel) -> str:
    """Return the path of the part that reads text; empty if no other part has linear modules but the head."""
    decoder, head = base.get_decoder(), base.get_output_embeddings()
    path = next((name for name, module in base.named_modules() if module is decoder), "")
    other_modules = [
        module
        for name, module in base.named_modules()
        if isinstance(module, nn.Linear) and module is not head and not name.startswith(f"{path}.")
    ]
    return path if other_modules else ""


def load_adapted(model: ModelSection, folder: Path) -> PeftModel:
    """Load the base model with the adapter in `folder` beside its weights, by plain PEFT."""
    base = load_base(model)
    with libraries.hide_packages(*libraries.UNUSED), load_errors("adapter", ModelSection(name=str(folder))):
        return PeftModel.from_pretrained(base, str(folder)).eval()


def load_merged(model: ModelSection, folder: Path | None) -> PreTrainedModel:
    """Load the base model with the adapter in `folder`, if any, merged into its weights, which runs faster.

    A trained prompt does not change weights, and 4-bit weights are too coarse to take a change. In both cases
    the adapter stays beside the weights.
    """
    if folder is None:
        return load_base(model)
    adapted = load_adapted(model, folder)
    if model.load_in_4bit or adapted.active_peft_config.is_prompt_learning:
        return adapted
    return adapted.merge_and_unload()


def save_merged(model: ModelSection, folder: Path, out: Path) -> None:
    """Write the merged model (16 or 32 bits) and its tokenizer into `out`, ready to be served."""
    from transformers import AutoTokenizer, GenerationConfig
    from transformers.utils import cached_file

    merged = load_merged(model.model_copy(update={"load_in_4bit": False}), folder)
    # transformers refuses to write sampling settings beside greedy decoding, which many a model has.
    generation, merged.generation_config = merged.generation_config, GenerationConfig()
    merged.save_pretrained(str(out))
    if generation is not None:
        generation.to_json_file(out / "generation_config.json")
    AutoTokenizer.from_pretrained(model.name, revision=model.revision).save_pretrained(str(out))
    for name in PROCESSOR_FILES:
        # Without a network, a file that is not in the cache is a connection error.
        missing_is_none = dict.fromkeys(
            ("_raise_exceptions_for_missing_entries", "_raise_exceptions_for_connection_errors"), False
        )
        if file := cached_file(model.name, name, revision=model.revision, **missing_is_none):
            shutil.copy(file, out)


def _keep_freed_memory() -> None:
    """Let the C library reuse large blocks: by default it returns each to the kernel and faults it in again.

    That took a third of a GRPO step on CPU, because logits over a vocabulary are large blocks. Only glibc has
    these settings; elsewhere nothing happens.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "gnu_get_libc_version"):
        trim_threshold, top_pad, mmap_max = -1, -2, -4  # malloc.h
        libc.mallopt(mmap_max, 0)
        libc.mallopt(trim_threshold, 2**31 - 1)
        libc.mallopt(top_pad, 2**28)
