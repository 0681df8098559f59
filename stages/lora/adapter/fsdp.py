"""FSDP2: each process holds a part of every decoder layer of the base, and the whole adapter.

torch gathers a layer when it runs. Embeddings, the head and all that trains are in every process, so packed
weights, checkpoints and the proof are what they are in one process; gradients are added up before each step.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from stages.config import LaunchSection
from stages.errors import ConfigError
from stages.lora.adapter import adapter
from stages.models.base import decoder_layers, device
from stages.runtime import distributed

if TYPE_CHECKING:
    from peft import PeftModel


def is_sharded(launch: LaunchSection) -> bool:
    """Whether this stage, as it runs now, is to divide its base."""
    return launch.divides and distributed.size() > 1


def load_device(launch: LaunchSection) -> torch.device:
    """Where the base is loaded: a GPU that holds a part of it may have no room for the whole."""
    return torch.device("cpu") if is_sharded(launch) else device()


def shard_base(adapted: PeftModel, launch: LaunchSection) -> None:
    """Leave each process its part of the base, if `launch` asks for that.

    To be called before a trainer is built. ConfigError if the model cannot be divided.
    """
    if not is_sharded(launch):
        return
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    base = adapted.get_base_model()
    stack = base.base_model
    layers = decoder_layers(base)
    if not layers:
        raise ConfigError(f"{type(base).__name__} names no layers for fsdp2 to divide", "use ddp")
    if hasattr(base.config, "router_aux_loss_coef"):
        # transformers finds what routers say by the name of the class, and torch gives it another.
        raise ConfigError(
            f"{type(base).__name__} is a mixture of experts, which fsdp2 does not divide", "use ddp"
        )
    distributed.barrier()
    mesh = init_device_mesh(device().type, (distributed.size(),))
    # Not the weights themselves: torch frees them as soon as nobody holds them.
    parts = {id(weight) for layer in layers for weight in _of_base(layer)}
    rest = {weight for weight in stack.parameters() if id(weight) not in parts}
    for module in (*layers, stack):  # the stack itself has none, but as the root it gathers layers ahead
        fully_shard(module, mesh=mesh, ignored_params=rest)
    adapted.to(device())
    adapted._is_accelerate_prepared = True  # DDP refuses such weights; `average_gradients` stands in
    with torch.no_grad():
        base(input_ids=torch.tensor([[0, 1]], device=device()))  # torch sets itself up in the first pass


def _of_base(layer: nn.Module) -> Iterator[nn.Parameter]:
    """The parameters that are no adapter's."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    owned = set()
    for module in layer.modules():
        if isinstance(module, BaseTunerLayer):
            for name in module.adapter_layer_names:
                owned |= set(getattr(module, name).parameters())
    yield from (weight for weight in layer.parameters() if weight not in owned)


def local_share(model: nn.Module) -> dict[str, float]:
    """For a summary: which share of the base's elements this process holds, if the base is divided."""
    from torch.distributed.tensor import DTensor

    if not _divided(model):
        return {}
    weights = [weight for weight in model.parameters() if not weight.requires_grad]
    here = sum(w.to_local().numel() if isinstance(w, DTensor) else w.numel() for w in weights)
    return {"base_held": round(here / sum(weight.numel() for weight in weights), 4)}


def _divided(model: nn.Module) -> list[Any]:
    from torch.distributed.fsdp import FSDPModule

    return [module for module in model.modules() if isinstance(module, FSDPModule)]


@contextmanager
def unsharded(model: nn.Module) -> Iterator[None]:
    """Inside, every process holds the whole base, and may compute without the others.

    To be entered by all processes together.
    """
    layers = _divided(model)  # the root is the first
    for layer in layers:
        layer.set_reshard_after_forward(False, recurse=False)
        layer.unshard()
    try:
        yield
    finally:
        for layer in layers:
            layer.set_reshard_after_forward(True, recurse=False)
            layer.reshard()
        if layers:
            layers[0].reset_iter_state()  # torch would look for these passes in the next backward one


def average_gradients(model: Any) -> None:
    """Replace every gradient by its mean over all processes, if the base is divided.

    DDP would have taken the mean in the backward pass, and refuses a divided model.
    """
    if not _divided(model):
        return
    weights = list(adapter.trained_parameters(model).values())
    gradients = [torch.zeros_like(w) if w.grad is None else w.grad for w in weights]
    joined = torch.cat([gradient.flatten() for gradient in gradients])  # one collective for all
    distributed.all_reduce([joined])
    means = joined.div_(distributed.size()).split([gradient.numel() for gradient in gradients])
    for weight, mean in zip(weights, means, strict=True):
        weight.grad = mean.view_as(weight).to(weight.dtype)


def full_tensor(weight: Tensor) -> Tensor:
    """The whole of a weight. Of a divided one all processes ask at the same time."""
    from torch.distributed.tensor import DTensor

    return weight.full_tensor() if isinstance(weight, DTensor) else weight  # type: ignore[no-any-return]
