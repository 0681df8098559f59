"""Base model and LoRA adapter: load, attach, name, save. PEFT does the work; what it lets pass silently is checked here.

A compensated adapter is one ordinary LoRA of rank 2r, A = [A; A₀] and B = [B, −B₀] with twice the alpha (√2 times under
rslora), whose second half is frozen: the model starts as the base, and the base weight is never changed.
"""

from __future__ import annotations

import copy
import ctypes
import importlib.util
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from stages.config import LoraSection, ModelSection
from stages.errors import ArtifactError, ConfigError, MissingInputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ADAPTER = "adapter_model.safetensors"


def device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def load_base(model: ModelSection) -> PreTrainedModel:
    """The base model in eval mode on this process's device."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    if device().type == "cpu":
        _keep_freed_memory()
    kind: dict[str, Any] = {} if model.attention == "auto" else {"attn_implementation": model.attention}
    if model.load_in_4bit:
        kind |= _four_bit(model)
    try:
        loaded = AutoModelForCausalLM.from_pretrained(model.name, revision=model.revision, dtype=model.dtype, **kind)
    except (OSError, ValueError) as error:
        raise MissingInputError(f"cannot load model {model.name}: {str(error).splitlines()[0]}") from None
    if device().type == "cpu" and isinstance(head := loaded.get_output_embeddings(), nn.Linear):
        # With `logits_to_keep` the head gets a strided slice, for which torch on CPU copies the vocabulary-sized weight once
        # per example: 31 % of a training step on SmolLM2.
        head.register_forward_pre_hook(_contiguous)
    if not model.load_in_4bit:
        return loaded.to(device()).eval()
    for module in loaded.modules():
        # On CPU bitsandbytes would repack weights at their first use in eval mode, and round their scales as it does.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return loaded.eval()


def _four_bit(model: ModelSection) -> dict[str, Any]:
    """How QLoRA (arXiv 2305.14314) loads a base model."""
    from transformers import BitsAndBytesConfig

    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError("model.load_in_4bit: bitsandbytes is not installed", "pip install 'lorapar[qlora]'")
    compute = torch.float32 if model.dtype == "float32" else torch.bfloat16
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=compute
    )
    return {"quantization_config": nf4, "device_map": {"": device()}}


def load_adapted(model: ModelSection, folder: Path) -> PeftModel:
    """The base model with the adapter of `folder` beside its weights, by plain PEFT, as any user would load it."""
    return PeftModel.from_pretrained(load_base(model), str(folder)).eval()


def load_merged(model: ModelSection, folder: Path | None) -> PreTrainedModel:
    """The base model with the adapter of `folder`, if any, merged into its weights: the faster form to ask.

    A trained prompt is no change of weights, and 4 bits have no room for one: these come as the adapted model that they are.
    """
    if folder is None:
        return load_base(model)
    adapted = load_adapted(model, folder)
    if model.load_in_4bit or adapted.active_peft_config.is_prompt_learning:
        return adapted  # type: ignore[return-value]
    return adapted.merge_and_unload()  # type: ignore[no-any-return, operator]


def save_merged(model: ModelSection, folder: Path, out: Path) -> None:
    """Write the merged model with its tokenizer into `out`, ready to be served; its weights have 16 or 32 bits."""
    from transformers import AutoTokenizer

    load_merged(model.model_copy(update={"load_in_4bit": False}), folder).save_pretrained(str(out))
    AutoTokenizer.from_pretrained(model.name, revision=model.revision).save_pretrained(str(out))


def _keep_freed_memory() -> None:
    """Let the C library reuse large blocks instead of giving each back to the kernel and faulting it in again.

    A third of a GRPO step on CPU went there: logits over a vocabulary are such blocks. glibc only; elsewhere nothing happens.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "gnu_get_libc_version"):
        trim_threshold, top_pad, mmap_max = -1, -2, -4  # malloc.h
        libc.mallopt(mmap_max, 0)
        libc.mallopt(trim_threshold, 2**31 - 1)
        libc.mallopt(top_pad, 2**28)


def _contiguous(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (inputs[0].contiguous(), *inputs[1:])


def check_targets(base: nn.Module, lora: LoraSection) -> None:
    """ConfigError unless every target module is there: PEFT passes over those that are not as long as one is."""
    linear = {name.split(".")[-1] for name, module in base.named_modules() if isinstance(module, nn.Linear)}
    missing = [name for name in lora.target_modules if name not in linear]
    if missing:
        raise ConfigError(
            f"lora.target_modules: no {', '.join(missing)} in {type(base).__name__}",
            f"choose from: {', '.join(sorted(linear))}",
        )


def _lora_config(lora: LoraSection, dropout: float, doubled: bool, init: bool | str) -> LoraConfig:
    alpha = lora.alpha * ((math.sqrt(2) if lora.rslora else 2) if doubled else 1)
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.r * (2 if doubled else 1),
        lora_alpha=alpha,  # type: ignore[arg-type]  # PEFT multiplies with it; √2 of rslora is no integer
        lora_dropout=dropout,
        target_modules=list(lora.target_modules),
        use_rslora=lora.rslora,
        init_lora_weights=init,  # type: ignore[arg-type]
    )


def initial(base: PreTrainedModel, lora: LoraSection, seed: int) -> PeftModel:
    """`base` with the initial adapter A₀, B₀ that `lora.init` and the seed give, compensated where asked."""
    check_targets(base, lora)
    start = None if lora.init == "normal" else _peft_start(base, lora, seed)
    model = get_peft_model(base, _lora_config(lora, 0.0, lora.compensated, False))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, module in sorted(lora_layers(model).items()):
            shape = scored_shape(name, module.weight, lora)
            value = start[name] if start else torch.randn(shape, generator=generator) * lora.std
            value = value.to(module.weight)
            if lora.compensated:
                rows = _is_a(name)
                value = torch.cat([value, value if rows else -value], dim=0 if rows else 1)
            module.weight.copy_(value)
    return model


def _peft_start(base: PreTrainedModel, lora: LoraSection, seed: int) -> dict[str, Tensor]:
    """A₀ and B₀ as PEFT initialises them; on a copy where PEFT would subtract B₀A₀ from the base weight."""
    torch.manual_seed(seed)
    init = True if lora.init == "default" else lora.init
    subtracts = lora.init in ("pissa", "olora")
    model = get_peft_model(copy.deepcopy(base) if subtracts else base, _lora_config(lora, 0.0, False, init))
    start = {name: module.weight.detach().clone() for name, module in lora_layers(model).items()}
    model.unload()
    return start


def _is_a(name: str) -> bool:
    return name.endswith(".lora_A.weight")


def scored_shape(name: str, weight: Tensor, lora: LoraSection) -> tuple[int, int]:
    """Shape of the trainable part of a LoRA weight: all of it, or the first half of a compensated one's rank."""
    out, into = weight.shape
    return (lora.r, into) if _is_a(name) else (out, lora.r)


def trainable_part(name: str, weight: Tensor, lora: LoraSection) -> Tensor:
    """That part as a view."""
    rows, columns = scored_shape(name, weight, lora)
    return weight[:rows, :columns]


def full_mask(name: str, mask: Tensor, weight: Tensor) -> Tensor:
    """A mask of the trainable part, widened to the whole weight with False."""
    whole = torch.zeros(weight.shape, dtype=torch.bool)
    whole[: mask.shape[0], : mask.shape[1]] = mask
    return whole


def lora_layers(model: nn.Module, adapter: str = "default") -> dict[str, nn.Linear]:
    """The lora_A and lora_B layers by PEFT's parameter name without the adapter's, as in an adapter file."""
    suffixes = (f".lora_A.{adapter}", f".lora_B.{adapter}")
    return {
        f"{name.removesuffix('.' + adapter)}.weight": module  # type: ignore[misc]
        for name, module in model.named_modules()
        if name.endswith(suffixes)
    }


def attach(base: PreTrainedModel, lora: LoraSection, folder: Path, dropout: float = 0.0) -> PeftModel:
    """`base` with the adapter of `folder`; ArtifactError unless every name and shape fits."""
    check_targets(base, lora)
    model = get_peft_model(base, _lora_config(lora, dropout, lora.compensated, False))
    stored, wanted = read(folder), lora_layers(model)
    if stored.keys() != wanted.keys():
        odd = sorted(stored.keys() ^ wanted.keys())[0]
        raise ArtifactError(
            f"{folder} does not fit the model: {odd} is on one side only", "it was made for another base or lora"
        )
    for name, module in wanted.items():
        if stored[name].shape != module.weight.shape:
            raise ArtifactError(
                f"{folder} does not fit the model: {name} is {tuple(stored[name].shape)}, expected {tuple(module.weight.shape)}"
            )
    set_peft_model_state_dict(model, stored)
    for module in wanted.values():
        module.weight.requires_grad_(True)
    return model


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that are trained, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def read(folder: Path, file: str = ADAPTER) -> dict[str, Tensor]:
    """The tensors of an adapter file by parameter name."""
    try:
        return load_file(folder / file)
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"cannot read the adapter in {folder}: {error}") from None


def save(model: PeftModel, folder: Path, name: str) -> None:
    """Write the `default` adapter as plain PEFT files into `folder`, made for the base model called `name`."""
    model.peft_config["default"].base_model_name_or_path = name
    model.save_pretrained(str(folder), selected_adapters=["default"])
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's template, all placeholders
