"""FSDP2: each process holds a part of every decoder layer of the base, and the whole adapter.

torch gathers a layer when it runs. Embeddings, the head and all that trains are in every process, so packed
weights, checkpoints and the proof are what they are in one process; gradients are added up before each step.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
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
    adapted._is_accelerate_prepared = True  # DDP refuses such weights; `Divided` adds the gradients up
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


class Divided:
    """Mixin, to stand before a Trainer among the base classes, for models that may be divided."""

    model: Any

    def _clip_grad_norm(self, model: Any) -> Any:
        """Clip the mean of all processes' gradients, which DDP would have taken in the backward pass."""
        if _divided(self.model):
            trained = list(adapter.trained_parameters(self.model).values())
            parts = [torch.zeros_like(w) if w.grad is None else w.grad for w in trained]
            joined = torch.cat([part.flatten() for part in parts])
            distributed.all_reduce([joined])
            found = joined.div_(distributed.size()).split([part.numel() for part in parts])
            for weight, part in zip(trained, found, strict=True):
                weight.grad = part.view_as(weight).to(weight.dtype)
        return super()._clip_grad_norm(model)  # type: ignore[misc]


class DividedRollouts(Divided):
    """The same for GRPO: processes sample at their own pace."""

    args: Any

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        # vLLM has a model of its own, for which weights are gathered one by one.
        alone: AbstractContextManager[None] = nullcontext() if self.args.use_vllm else unsharded(self.model)
        with alone:
            return super()._generate_and_score_completions(inputs)  # type: ignore[misc]


def full_tensor(weight: Tensor) -> Tensor:
    """The whole of a weight. Of a divided one all processes ask at the same time."""
    from torch.distributed.tensor import DTensor

    return weight.full_tensor() if isinstance(weight, DTensor) else weight  # type: ignore[no-any-return]
