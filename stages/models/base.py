"""The base model: loaded, with an adapter beside its weights, or merged into them."""

from __future__ import annotations

import ctypes
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from stages.config import ModelSection
from stages.errors import ConfigError
from stages.models.dtype import resolve, warn_if_slow
from stages.models.load_errors import check_no_missing_weights, load_errors
from stages.runtime import libraries

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def device() -> torch.device:
    """This process's GPU if there is one, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def load_base(model: ModelSection, where: torch.device | None = None) -> PreTrainedModel:
    """The base model in eval mode. where: on this process's device, unless given; not for 4 bits."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    dtype = resolve(model)
    warn_if_slow(dtype)
    if device().type == "cpu":
        _keep_freed_memory()
    kind: dict[str, Any] = {} if model.attention == "auto" else {"attn_implementation": model.attention}
    if model.load_in_4bit:
        kind |= _four_bit(dtype)
    with load_errors("model", model):
        loaded, found = AutoModelForCausalLM.from_pretrained(
            model.name, revision=model.revision, dtype=dtype, output_loading_info=True, **kind
        )
        check_no_missing_weights(model, found["missing_keys"])
    if device().type == "cpu" and isinstance(head := loaded.get_output_embeddings(), nn.Linear):
        # With `logits_to_keep` the head gets a strided slice, and for that torch on CPU copies the
        # vocabulary-sized weight once per example: 31 % of a training step on SmolLM2.
        head.register_forward_pre_hook(_contiguous)
    if not model.load_in_4bit:
        loaded = loaded.to(where or device())
    for module in loaded.modules():
        # On CPU bitsandbytes would repack the weights at their first use in eval mode and round their scales.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    if loaded.device.type == device().type:  # else nothing is computed before it is moved
        with load_errors("model", model):
            _try(loaded)
    return loaded.eval()


def decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    """The layers, which the architecture names as not to be split among devices; none, if it names none."""
    names = model._no_split_modules or ()
    return [module for module in model.modules() if type(module).__name__ in names]


def _try(loaded: PreTrainedModel) -> None:
    """Two tokens through the model as in training: what a config says wrongly shows here at the latest."""
    ends = loaded.generation_config.eos_token_id if loaded.generation_config else None
    if not all(isinstance(end, int) for end in (ends if isinstance(ends, list) else [ends or 0])):
        raise TypeError(f"generation_config.json: eos_token_id is {ends!r}")
    here = [device()] if device().type == "cuda" else []
    with torch.random.fork_rng(devices=here), torch.no_grad():
        loaded.train()(input_ids=torch.tensor([[0, 1]], device=loaded.device))


def _four_bit(dtype: str) -> dict[str, Any]:
    """How QLoRA (arXiv 2305.14314) loads a base model that computes in `dtype`."""
    from transformers import BitsAndBytesConfig

    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError("model.load_in_4bit: bitsandbytes is not installed", "pip install 'lorapar[qlora]'")
    compute = torch.float32 if dtype == "float32" else torch.bfloat16
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute,
    )
    return {"quantization_config": nf4, "device_map": {"": device()}}


def with_adapter(base: PreTrainedModel, config: PeftConfig) -> PeftModel:
    """The base model with a new adapter; PEFT would load bitsandbytes for it, whatever the base is."""
    with libraries.hidden(*libraries.UNUSED):
        return get_peft_model(base, config)  # type: ignore[return-value]


def load_adapted(model: ModelSection, folder: Path) -> PeftModel:
    """The base model with the adapter of `folder` beside its weights, loaded by plain PEFT."""
    base = load_base(model)
    with libraries.hidden(*libraries.UNUSED):
        return PeftModel.from_pretrained(base, str(folder)).eval()


def load_merged(model: ModelSection, folder: Path | None) -> PreTrainedModel:
    """The base model with the adapter of `folder`, if any, merged into its weights: the faster form to run.

    A trained prompt does not change weights, and 4-bit weights are too coarse to take a change. In both cases
    the adapter stays beside the weights.
    """
    if folder is None:
        return load_base(model)
    adapted = load_adapted(model, folder)
    if model.load_in_4bit or adapted.active_peft_config.is_prompt_learning:
        return adapted  # type: ignore[return-value]
    return adapted.merge_and_unload()  # type: ignore[no-any-return, operator]


def save_merged(model: ModelSection, folder: Path, out: Path) -> None:
    """Write the merged model, in 16 or 32 bits, with its tokenizer into `out`, ready to be served."""
    from transformers import AutoTokenizer

    load_merged(model.model_copy(update={"load_in_4bit": False}), folder).save_pretrained(str(out))
    AutoTokenizer.from_pretrained(model.name, revision=model.revision).save_pretrained(str(out))


def _keep_freed_memory() -> None:
    """Let the C library reuse large blocks: by default it returns each to the kernel and faults it in again.

    A third of a GRPO step on CPU was lost to that, because logits over a vocabulary are large blocks.
    Only glibc has these settings; elsewhere nothing happens.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "gnu_get_libc_version"):
        trim_threshold, top_pad, mmap_max = -1, -2, -4  # malloc.h
        libc.mallopt(mmap_max, 0)
        libc.mallopt(trim_threshold, 2**31 - 1)
        libc.mallopt(top_pad, 2**28)


def _contiguous(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (inputs[0].contiguous(), *inputs[1:])
