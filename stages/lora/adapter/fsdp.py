"""FSDP2 for the frozen base: each process holds a shard of every decoder layer, and the full adapter.

torch gathers a layer when it runs. Embeddings, the head and all trained parameters are replicated, so sparse
layers, checkpoints and the proof that frozen elements have not moved work as in one process. Gradients are
averaged before each step.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from stages.config import LaunchSection, ModelSection
from stages.errors import ConfigError
from stages.lora.adapter import adapter
from stages.models import dtype
from stages.models.base import decoder_layers, device, load_base
from stages.runtime import distributed, resources


def is_sharded(launch: LaunchSection) -> bool:
    """True if this stage shards its base: `launch` asks for it and there are several processes."""
    return launch.shards_base and distributed.world_size() > 1


def load(model: ModelSection, launch: LaunchSection) -> PreTrainedModel:
    """Load the base; if `shard_base` is to shard it, then on the CPU, as one GPU may not have room for it.

    If processes copy the weights, each waits until the one before on its machine has sharded its copy: main
    memory holds one copy at a time.
    """
    if not is_sharded(launch):
        return load_base(model)
    if dtype.is_converted(model):
        # Rank r of n passes r barriers here, and n − 1 − r in `shard_base`: rank r loads once rank r − 1 has
        # sharded its copy and reached barrier r.
        for _ in range(distributed.local_rank()):
            distributed.barrier()
    return load_base(model, torch.device("cpu"))


def shard_base(adapted: PeftModel, model: ModelSection, launch: LaunchSection) -> None:
    """Shard the base, which `load` has loaded, over the processes, if `launch` asks for it.

    Call it before the trainer is built. ConfigError if the model cannot be sharded.
    """
    if not is_sharded(launch):
        return
    _shard_layers(adapted)
    if dtype.is_converted(model):
        resources.release_memory()
        for _ in range(distributed.local_rank() + 1, distributed.local_world_size()):
            distributed.barrier()
    # Keeps accelerate from wrapping the model in DDP, which refuses DTensors. `average_gradients` stands in.
    adapted._is_accelerate_prepared = True
    with torch.no_grad():  # FSDP initialises lazily, in the first pass
        adapted.get_base_model()(input_ids=torch.tensor([[0, 1]], device=device()))


def _shard_layers(adapted: PeftModel) -> None:
    """Keep only this process's shards of the decoder layers; no collectives, as the others may be waiting."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    base = adapted.get_base_model()
    stack = base.base_model
    layers = decoder_layers(base)
    if not layers:
        raise ConfigError(f"{type(base).__name__} names no layers for fsdp2 to divide", "use ddp")
    if hasattr(base.config, "router_aux_loss_coef"):
        # transformers collects router logits by class name, and fully_shard changes the class's name.
        raise ConfigError(
            f"{type(base).__name__} is a mixture of experts, which fsdp2 does not divide", "use ddp"
        )
    distributed.connect()
    mesh = init_device_mesh(device().type, (distributed.world_size(),))
    # Ids, not references: fully_shard replaces these weights, and a reference would keep the full ones alive.
    sharded_ids = {id(weight) for layer in layers for weight in _base_parameters(layer)}
    replicated = {weight for weight in stack.parameters() if id(weight) not in sharded_ids}
    # The stack comes last. It shards nothing of its own, but as FSDP's root it prefetches the next layer.
    for module in (*layers, stack):
        fully_shard(module, mesh=mesh, ignored_params=replicated)
    adapted.to(device())


def _base_parameters(layer: nn.Module) -> Iterator[nn.Parameter]:
    """The parameters of a decoder layer that belong to the base, not to an adapter."""
    adapter_parameters = set()
    for module in layer.modules():
        if isinstance(module, BaseTunerLayer):
            for name in module.adapter_layer_names:
                adapter_parameters |= set(getattr(module, name).parameters())
    yield from (weight for weight in layer.parameters() if weight not in adapter_parameters)


def local_share(model: nn.Module) -> dict[str, float]:
    """Summary entry `base_held`, the share of the base's elements in this process; empty if not sharded."""
    from torch.distributed.tensor import DTensor

    if not _fsdp_modules(model):
        return {}
    weights = [weight for weight in model.parameters() if not weight.requires_grad]
    local = sum(w.to_local().numel() if isinstance(w, DTensor) else w.numel() for w in weights)
    return {"base_held": round(local / sum(weight.numel() for weight in weights), 4)}


def _fsdp_modules(model: nn.Module) -> list[Any]:
    """The modules that `fully_shard` has wrapped, the root first; none if the model is not sharded."""
    from torch.distributed.fsdp import FSDPModule

    return [module for module in model.modules() if isinstance(module, FSDPModule)]


@contextmanager
def unsharded(model: nn.Module) -> Iterator[None]:
    """Context in which every process holds the full base and can run it without the other processes.

    All processes must enter it together, because entering gathers the shards.
    """
    modules = _fsdp_modules(model)
    for module in modules:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    try:
        yield
    finally:
        for module in modules:
            module.set_reshard_after_forward(True, recurse=False)
            module.reshard()
        if modules:
            # The root has recorded these forward passes and would expect them in the next backward pass.
            modules[0].reset_iter_state()


def average_gradients(model: Any) -> None:
    """Replace every gradient by its mean over all processes if the base is sharded.

    DDP would take the mean in the backward pass, and refuses a sharded model.
    """
    if not _fsdp_modules(model):
        return
    weights = list(adapter.trained_parameters(model).values())
    # A process without a gradient for a weight contributes zeros: all_reduce needs equal shapes.
    gradients = [torch.zeros_like(w) if w.grad is None else w.grad for w in weights]
    # One collective for all gradients, on their concatenation: (trained elements,).
    joined = torch.cat([gradient.flatten() for gradient in gradients])
    distributed.all_reduce([joined])
    means = joined.div_(distributed.world_size()).split([gradient.numel() for gradient in gradients])
    for weight, mean in zip(weights, means, strict=True):
        weight.grad = mean.view_as(weight).to(weight.dtype)


def full_tensor(weight: Tensor) -> Tensor:
    """Gather the full weight if it is sharded (a collective: all processes must call it), else return it."""
    from torch.distributed.tensor import DTensor

    return weight.full_tensor() if isinstance(weight, DTensor) else weight  # type: ignore[no-any-return]
