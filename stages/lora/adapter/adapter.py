"""Base model and LoRA adapter: load, attach, name, save.

PEFT does the work; mistakes that it ignores silently are checked here.

A compensated adapter is one ordinary LoRA of rank 2r, A = [A; A₀] and B = [B, −B₀], with twice the alpha (√2
times with use_rslora). Its second half is frozen. The model starts as the base, whose weights never change.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from peft import LoraConfig, PeftModel, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from stages.config import LoraSection, ModelSection
from stages.config.sources import ALL_LINEAR, SUBTRACTED
from stages.errors import ArtifactError, ConfigError
from stages.models.base import with_adapter

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ADAPTER = "adapter_model.safetensors"


def with_targets(base: PreTrainedModel, lora: LoraSection) -> LoraSection:
    """`lora` with the names of the base's modules that get an adapter.

    ConfigError unless every target module exists: PEFT ignores missing ones as long as one exists.
    """
    linear = linear_modules(base)
    if lora.target_modules == [ALL_LINEAR]:
        return lora.model_copy(update={"target_modules": sorted(linear)})
    missing = [name for name in lora.target_modules if name not in linear]
    if missing:
        raise ConfigError(
            f"lora.target_modules: no {', '.join(missing)} in {type(base).__name__}",
            f"choose from: {', '.join([*sorted(linear), ALL_LINEAR])}",
        )
    return lora


def linear_modules(base: PreTrainedModel) -> set[str]:
    """The last parts of the names of all linear modules but the head.

    ConfigError if there are none, as in GPT-2, whose modules are Conv1D.
    """
    head = base.get_output_embeddings()
    found = {n: m for n, m in base.named_modules() if isinstance(m, nn.Linear) and m is not head}
    if not found:
        raise ConfigError(
            f"{type(base).__name__} has no linear modules but its head: no adapter can be put anywhere"
        )
    return {name.rpartition(".")[2] for name in found}


def _lora_config(lora: LoraSection, dropout: float, doubled: bool, init: bool | str) -> LoraConfig:
    alpha = lora.lora_alpha * ((math.sqrt(2) if lora.use_rslora else 2) if doubled else 1)
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.r * (2 if doubled else 1),
        lora_alpha=alpha,  # type: ignore[arg-type]  # PEFT only multiplies with it, and √2 is no integer
        lora_dropout=dropout,
        target_modules=list(lora.target_modules),
        use_rslora=lora.use_rslora,
        init_lora_weights=init,  # type: ignore[arg-type]
    )


def initial(base: PreTrainedModel, lora: LoraSection, seed: int) -> PeftModel:
    """`base` with the initial adapter A₀, B₀ that `lora` and the seed give, compensated if `lora` says so."""
    lora = with_targets(base, lora)
    start = None if lora.init == "normal" else _peft_start(base, lora, seed)
    model = with_adapter(base, _lora_config(lora, 0.0, lora.compensated, False))
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
    """A₀ and B₀ as PEFT initialises them; where it subtracts B₀A₀ from the base, that is put back."""
    torch.manual_seed(seed)
    init = True if lora.init == "default" else lora.init
    kept = {  # not on the device, which may have no room for the base twice
        name: module.weight.detach().to("cpu", copy=True)
        for name, module in base.named_modules()
        if lora.init in SUBTRACTED
        and f".{name}".endswith(tuple(f".{target}" for target in lora.target_modules))
    }
    model = with_adapter(base, _lora_config(lora, 0.0, False, init))
    start = {name: module.weight.detach().clone() for name, module in lora_layers(model).items()}
    model.unload()
    for name, weight in kept.items():
        base.get_submodule(name).weight.data.copy_(weight)
    return start


def _is_a(name: str) -> bool:
    return name.endswith(".lora_A.weight")


def scored_shape(name: str, weight: Tensor, lora: LoraSection) -> tuple[int, int]:
    """Shape of a LoRA weight's trainable part: all of it or, if compensated, the first half of its rank."""
    out, into = weight.shape
    return (lora.r, into) if _is_a(name) else (out, lora.r)


def trainable_part(name: str, weight: Tensor, lora: LoraSection) -> Tensor:
    """The trainable part of a LoRA weight, as a view."""
    rows, columns = scored_shape(name, weight, lora)
    return weight[:rows, :columns]


def full_mask(name: str, mask: Tensor, weight: Tensor) -> Tensor:
    """A mask of the trainable part, widened to the whole weight with False."""
    whole = torch.zeros(weight.shape, dtype=torch.bool)
    whole[: mask.shape[0], : mask.shape[1]] = mask
    return whole


def lora_layers(model: nn.Module, adapter: str = "default") -> dict[str, nn.Linear]:
    """The lora_A and lora_B layers, by parameter name as in an adapter file: without the adapter's name."""
    suffixes = (f".lora_A.{adapter}", f".lora_B.{adapter}")
    return {
        f"{name.removesuffix('.' + adapter)}.weight": module  # type: ignore[misc]
        for name, module in model.named_modules()
        if name.endswith(suffixes)
    }


def attach(base: PreTrainedModel, lora: LoraSection, folder: Path, dropout: float = 0.0) -> PeftModel:
    """`base` with the adapter of `folder`; ArtifactError unless every name and shape fits."""
    lora = with_targets(base, lora)
    model = with_adapter(base, _lora_config(lora, dropout, lora.compensated, False))
    stored, wanted = read(folder), lora_layers(model)
    if stored.keys() != wanted.keys():
        odd = sorted(stored.keys() ^ wanted.keys())[0]
        raise ArtifactError(
            f"{folder} does not fit the model: {odd} is on one side only",
            "it was made for another base model or other lora settings",
        )
    for name, module in wanted.items():
        if stored[name].shape != module.weight.shape:
            found, expected = tuple(stored[name].shape), tuple(module.weight.shape)
            raise ArtifactError(f"{folder} does not fit the model: {name} is {found}, expected {expected}")
    set_peft_model_state_dict(model, stored)
    for module in wanted.values():
        module.weight.requires_grad_(True)
    return model


@contextmanager
def dropping_out(model: PeftModel, share: float) -> Iterator[None]:
    """Inside, the adapter drops out such a share of what goes into it, in training."""
    from peft.tuners.lora import LoraLayer

    usual = [m.lora_dropout for m in model.modules() if isinstance(m, LoraLayer)]
    before = [dict(one.items()) for one in usual]
    for one in usual:
        one.update({"default": nn.Dropout(share) if share else nn.Identity()})
    try:
        yield
    finally:
        for one, then in zip(usual, before, strict=True):
            one.update(then)


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that are trained, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def read(folder: Path, file: str = ADAPTER) -> dict[str, Tensor]:
    """The tensors of an adapter file by parameter name."""
    try:
        return load_file(folder / file)
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"cannot read the adapter in {folder}: {error}") from None


def save(model: PeftModel, folder: Path, base: ModelSection) -> None:
    """Write the `default` adapter into `folder` as plain PEFT files for this base model."""
    config = model.peft_config["default"]
    config.base_model_name_or_path = base.name
    config.revision = base.pinned
    write(model, folder)
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's template has nothing but placeholders


def write(model: PeftModel, folder: Path) -> None:
    """The `default` adapter's files, with the base that is named there.

    No embeddings: PEFT would ask the hub whether the base's vocabulary is that of its main revision.
    """
    model.save_pretrained(str(folder), selected_adapters=["default"], save_embedding_layers=False)
