"""LoRA adapters on a base model: build, attach, name, read and save them.

PEFT does the work; mistakes that it silently accepts are errors here.

A compensated adapter is one ordinary LoRA of rank 2r, A = [A; A₀] and B = [B, −B₀], so that its product is
BA − B₀A₀. The second half of its rank, A₀ and −B₀, is frozen. Training starts at A = A₀, B = B₀, where the
product is zero: the model starts as the base, whose weights never change. Alpha is doubled, so that
the scaling alpha / rank is that of rank r.
"""

from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from stages.config import LoraSection, ModelSection
from stages.config.sources import ALL_LINEAR, SUBTRACTED
from stages.errors import ArtifactError, ConfigError
from stages.lora.adapter.shared_cast import share_casts
from stages.models.base import language_model_path, with_adapter

ADAPTER = "adapter_model.safetensors"
STD = 0.01
"""Standard deviation of init normal, as in the paper."""


def with_targets(base: PreTrainedModel, lora: LoraSection) -> LoraSection:
    """Resolve `lora.target_modules` to names of modules of the base; `all-linear` becomes the full list.

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
    """Names of the language model's linear modules except the head, without path: {"q_proj", "up_proj", …}.

    ConfigError if there are none, as in GPT-2, whose modules are Conv1D.
    """
    head, prefix = base.get_output_embeddings(), language_model_path(base)
    names = {
        path.rpartition(".")[2]
        for path, module in base.named_modules()
        if isinstance(module, nn.Linear) and module is not head and path.startswith(prefix)
    }
    if not names:
        raise ConfigError(
            f"{type(base).__name__} has no linear modules except its head, so no adapter can be attached"
        )
    return names


def _with_lora(
    base: PreTrainedModel, lora: LoraSection, dropout: float = 0.0, init: bool | str = False
) -> PeftModel:
    """Add LoRA; ConfigError if PEFT cannot put it on these modules, or puts it on fused experts.

    init: PEFT's initialisation, which knows no compensation; False: the values follow later.
    """
    halves = 2 if lora.compensated and not init else 1
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.r * halves,
        lora_alpha=lora.lora_alpha * halves,  # PEFT multiplies
        lora_dropout=dropout,
        target_modules=list(lora.target_modules),
        init_lora_weights=init,
    )
    model = with_adapter(base, config, "lora.target_modules")
    if fused := model.active_peft_config.target_parameters:
        raise ConfigError(
            f"lora.target_modules: PEFT would adapt fused experts ({', '.join(fused)})",
            "name modules of attention alone",
        )
    share_casts(model)
    return model


def initial(base: PreTrainedModel, lora: LoraSection, seed: int) -> PeftModel:
    """Put the initial adapter A₀, B₀ on `base`, a deterministic function of `lora` and the seed.

    It is compensated if `lora` says so.
    """
    lora = with_targets(base, lora)
    peft_values = None if lora.init == "normal" else _peft_initial_values(base, lora, seed)
    model = _with_lora(base, lora)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        # Sorted by name, so that the random values do not depend on the order of the modules.
        for name, module in sorted(lora_layers(model).items()):
            shape = scored_shape(name, module.weight, lora)
            value = peft_values[name] if peft_values else torch.randn(shape, generator=generator) * STD
            value = value.to(module.weight)
            if lora.compensated:
                # [A₀; A₀] of shape (2r, in), or [B₀, −B₀] of shape (out, 2r)
                value = torch.cat([value, value]) if _is_a(name) else torch.cat([value, -value], dim=1)
            module.weight.copy_(value)
    return model


def _peft_initial_values(base: PreTrainedModel, lora: LoraSection, seed: int) -> dict[str, Tensor]:
    """Compute A₀ and B₀ with PEFT's own initialisation, by parameter name; `base` is left unchanged."""
    torch.manual_seed(seed)
    init = True if lora.init == "default" else lora.init
    # These methods subtract B₀A₀ from the base weights. Copies of the weights undo that to the bit; they are
    # on the CPU, because the device may not have room for the base twice.
    base_weights = {
        name: module.weight.detach().to("cpu", copy=True)
        for name, module in base.named_modules()
        if lora.init in SUBTRACTED
        and f".{name}".endswith(tuple(f".{target}" for target in lora.target_modules))
    }
    model = _with_lora(base, lora, init=init)
    values = {name: module.weight.detach().clone() for name, module in lora_layers(model).items()}
    model.unload()
    for name, weight in base_weights.items():
        base.get_submodule(name).weight.data.copy_(weight)
    narrow = [n for n, value in values.items() if tuple(value.shape) != scored_shape(n, value, lora)]
    if narrow:
        raise ConfigError(
            f"lora.r {lora.r}: init {lora.init} gives {narrow[0]} {min(values[narrow[0]].shape)} at most",
            "lower lora.r, or choose lora.init=normal",
        )
    return values


def _is_a(name: str) -> bool:
    return name.endswith(".lora_A.weight")


def scored_shape(name: str, weight: Tensor, lora: LoraSection) -> tuple[int, int]:
    """Shape of a LoRA weight's trainable part: all of it or, if compensated, the first half of its rank."""
    rows, columns = weight.shape  # A: (rank, in), B: (out, rank)
    return (lora.r, columns) if _is_a(name) else (rows, lora.r)


def trainable_part(name: str, weight: Tensor, lora: LoraSection) -> Tensor:
    """View of the trainable part of a LoRA weight."""
    rows, columns = scored_shape(name, weight, lora)
    return weight[:rows, :columns]


def full_mask(name: str, mask: Tensor, weight: Tensor, compensated: bool = True) -> Tensor:
    """Extend a mask of the trainable part to the shape of the full weight, with False elsewhere.

    ArtifactError unless it is of bools, with the shape of the weight or, if `compensated`, of half its rank.
    """
    mask = torch.as_tensor(mask)
    if mask.dtype != torch.bool:  # regions of elements, say, would be taken for true
        hint = "of a run's masks.safetensors take those under active/"
        raise ArtifactError(f"masks do not fit the adapter: {name} has {mask.dtype} in place of bool", hint)
    rows, columns = weight.shape
    halved = (rows // 2, columns) if _is_a(name) else (rows, columns // 2)
    if tuple(mask.shape) not in ((rows, columns), *([halved] if compensated else [])):
        shapes = f"a mask of shape {tuple(mask.shape)} and a weight of {(rows, columns)}"
        half = "masks of half its rank need an adapter that was compensated: sparsify(…, compensated=True)"
        is_half = tuple(mask.shape) == halved
        raise ArtifactError(f"masks do not fit the adapter: {name} has {shapes}", half if is_half else None)
    full = torch.zeros(weight.shape, dtype=torch.bool)
    full[: mask.shape[0], : mask.shape[1]] = mask
    return full


def lora_layers(model: nn.Module, adapter: str = "default") -> dict[str, nn.Linear]:
    """The lora_A and lora_B layers by parameter name, as in an adapter file (without the adapter's name)."""
    suffixes = (f".lora_A.{adapter}", f".lora_B.{adapter}")
    return {
        f"{name.removesuffix('.' + adapter)}.weight": module
        for name, module in model.named_modules()
        if name.endswith(suffixes)
    }


def attach(base: PreTrainedModel, lora: LoraSection, folder: Path, dropout: float = 0.0) -> PeftModel:
    """Put the adapter in `folder` on `base`; ArtifactError unless every name and shape fits."""
    lora = with_targets(base, lora)
    model = _with_lora(base, lora, dropout)
    stored, layers = read(folder), lora_layers(model)
    # PEFT would skip names that the model lacks and leave layers that the file lacks at their initial values.
    if stored.keys() != layers.keys():
        unmatched = sorted(stored.keys() ^ layers.keys())[0]
        raise ArtifactError(
            f"{folder} does not fit the model: {unmatched} is on one side only",
            "it was made for another base model or other lora settings",
        )
    for name, layer in layers.items():
        if stored[name].shape != layer.weight.shape:
            shape, expected = tuple(stored[name].shape), tuple(layer.weight.shape)
            raise ArtifactError(f"{folder} does not fit the model: {name} is {shape}, expected {expected}")
    set_peft_model_state_dict(model, stored)
    for layer in layers.values():
        layer.weight.requires_grad_(True)
    return model


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def read(folder: Path, file: str = ADAPTER) -> dict[str, Tensor]:
    """Read the tensors of an adapter file, by parameter name."""
    try:
        return load_file(folder / file)
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"cannot read the adapter in {folder}: {error}") from None


def save(model: PeftModel, folder: Path, base: ModelSection) -> None:
    """Write the `default` adapter into `folder` as plain PEFT files that name `base` as their base model."""
    config = model.peft_config["default"]
    config.base_model_name_or_path = base.name
    config.revision = base.pinned_revision
    write(model, folder)


def write(model: PeftModel, folder: Path) -> None:
    """Write the `default` adapter's files into `folder`; its PEFT config already names the base model."""
    # No card: PEFT's template has nothing but placeholders, and takes longer than a small adapter.
    model.create_or_update_model_card = lambda _: None
    # No embeddings: PEFT would ask the hub whether the base's vocabulary is that of its main revision.
    model.save_pretrained(str(folder), selected_adapters=["default"], save_embedding_layers=False)
