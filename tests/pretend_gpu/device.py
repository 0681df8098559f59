"""A pretend CUDA device: tensors lie in main memory, say `cuda:N`, and refuse what CUDA refuses.

Refused are operands on two devices, a generator of the other device, `numpy()` of device memory and, in a
process that has chosen a device, anything on another one. A subclass of Tensor says where it is; a
TorchFunctionMode sees every call, runs it on the CPU and marks its results; `torch.cuda` answers as a card of
80 GB does. It works in the thread that has installed it.

Inside a backward pass nothing is checked: gradients that autograd makes in C++ are plain tensors. Triton's
kernels cannot run: TRL has one for models whose rows cannot be packed (`baseline.method: prompt_tuning`).
"""

from __future__ import annotations

import traceback
import weakref
from collections import Counter
from typing import Any

import torch
import torch.utils.checkpoint
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_unflatten

GIB = 2**30
CALLS: Counter[str] = Counter()
"""Calls by the name of their function."""
REFUSED: list[str] = []
"""What was refused, and where."""
ACROSS = {
    "copy_", "to", "type_as", "view_as", "reshape_as", "expand_as", "resize_as_", "set_", "as_subclass",
    "is_same_size", "_has_compatible_shallow_copy_type", "_make_subclass", "_make_wrapper_subclass",
    "register_hook", "__get__", "__set__", "__setitem__", "__getitem__",
}  # fmt: skip
"""Functions whose operands may be on two devices; indexing has rules of its own."""
_real_generator = torch.Generator
_device_generators: weakref.WeakSet[torch.Generator] = weakref.WeakSet()


class DeviceTensor(torch.Tensor):
    """A tensor that says it is on a device; it has one subclass for each."""

    number = 0
    is_cuda = property(lambda self: True)  # type: ignore[assignment]
    is_cpu = property(lambda self: False)  # type: ignore[assignment]
    device = property(lambda self: torch.device("cuda", self.number))  # type: ignore[assignment]

    def get_device(self) -> int:
        return self.number

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _on_cpu(self.detach()).__reduce_ex__(protocol)


class Device:
    """The cards, and the one that this process has chosen: then nothing may lie on another one."""

    def __init__(self, count: int) -> None:
        self.types = [type(f"On{n}", (DeviceTensor,), {"number": n}) for n in range(count)]
        self.chosen, self.is_chosen = 0, False

    def choose(self, device: Any) -> None:
        self.chosen, self.is_chosen = self.number(device), True

    def number(self, spec: Any) -> int:
        """Number of the card that a device, a string or a number names."""
        if isinstance(spec, int):
            return spec
        index = torch.device(spec).index
        return self.chosen if index is None else index


def _names(spec: Any, kind: str) -> bool:
    """True if an argument names a device of this kind."""
    if isinstance(spec, torch.device):
        return spec.type == kind
    return isinstance(spec, str) and (spec == kind or spec.startswith(f"{kind}:"))


class Pretend(TorchFunctionMode):
    """Runs every call on the CPU, checks where its operands are, and marks what it returns."""

    def __init__(self, device: Device) -> None:
        super().__init__()
        self.device = device

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(function, "__name__", str(function))
        kwargs = {key: value for key, value in (kwargs or {}).items() if key != "pin_memory"}
        if name in ("device", "_parse_to"):  # they must see the device as it was written
            return function(*args, **kwargs)
        if name == "pin_memory":
            return args[0]
        if name == "cuda":
            function, name, args, kwargs = torch.Tensor.to, "to", (args[0], torch.device("cuda")), {}
        CALLS[name] += 1
        arguments, shape = tree_flatten((args, kwargs))
        tensors = [value for value in arguments if isinstance(value, torch.Tensor)]
        marked = [tensor for tensor in tensors if isinstance(tensor, DeviceTensor)]
        target = next((self.device.number(a) for a in arguments if _names(a, "cuda")), None)
        to_cpu = name == "cpu" or any(_names(value, "cpu") for value in arguments)
        self._check(name, args, kwargs, tensors, marked, target, to_cpu)
        plain = [torch.device("cpu") if _names(value, "cuda") else value for value in arguments]
        args, kwargs = tree_unflatten(plain, shape)
        if name == "register_hook" and marked:
            hook, of_device = args[1], type(marked[0])
            args = (args[0], lambda gradient: hook(self._mark(gradient, of_device)))
        with torch._C.DisableTorchFunctionSubclass():
            result = function(*args, **kwargs)
        if name == "__set__" and function.__self__ is torch.Tensor.data and isinstance(args[1], DeviceTensor):
            self._move(args[0], type(args[1]))
        if marked and (name == "cpu" or (name == "to" and to_cpu)):
            return _on_cpu(result, marked[0])
        if target is None and (to_cpu or not marked):
            return result
        if name == "to" and result is args[0] and not isinstance(result, DeviceTensor):
            result = (result if result.requires_grad and not result.is_leaf else result.detach()).clone()
        return self._mark(result, self.device.types[marked[0].number if target is None else target])

    def _check(self, name, args, kwargs, tensors, marked, target, to_cpu):
        """Raise what CUDA would say about the operands of a call."""
        numbers = {tensor.number for tensor in marked} | ({target} if target is not None else set())
        strangers = numbers - {self.device.chosen}
        if self.device.is_chosen and strangers:
            self._refuse(f"{name} on cuda:{min(strangers)}, in the process of cuda:{self.device.chosen}")
        if name in ("numpy", "__array__") and marked:
            self._refuse("can't convert cuda:0 device type tensor to numpy", TypeError)
        generator = kwargs.get("generator")
        if generator is not None:
            on_device = target is not None or (bool(marked) and not to_cpu)
            if on_device != (generator in _device_generators):
                self._refuse(f"Expected a generator of the other device type, in {name}")
        if torch._C._current_graph_task_id() != -1:  # in a backward pass
            return
        on_cpu = [tensor for tensor in tensors if tensor.dim() and not isinstance(tensor, DeviceTensor)]
        on_cpu = [tensor for tensor in on_cpu if torch.Tensor.device.__get__(tensor).type == "cpu"]
        if marked and (on_cpu or len({tensor.number for tensor in marked}) > 1) and name not in ACROSS:
            self._refuse(f"Expected all tensors to be on the same device, in {name}")
        if name == "__getitem__" and marked and not isinstance(args[0], DeviceTensor):
            self._refuse("indices should be on cpu or on the device of the indexed tensor (cpu)")
        if name == "__setitem__" and isinstance(args[0], DeviceTensor) and args[2] is not None:
            indexed = any(isinstance(index, torch.Tensor) for index in tree_flatten(args[1])[0])
            if indexed and any(tensor is args[2] for tensor in on_cpu):
                self._refuse("index_put_ of a value on the CPU into device memory")

    def _refuse(self, message: str, kind: type[Exception] = RuntimeError) -> None:
        stack = traceback.extract_stack()
        *_, last = (f for f in stack if "torch/" not in f.filename and __file__ != f.filename)
        REFUSED.append(f"{message}; {last.filename}:{last.lineno}: {last.line}")
        raise kind(message)

    def _mark(self, result: Any, of_device: type[DeviceTensor]) -> Any:
        values, shape = tree_flatten(result)
        for at, value in enumerate(values):
            if type(value) is torch.Tensor:
                value.__class__ = of_device
            elif type(value) is torch.nn.Parameter:  # its class must stay: it gets marked data
                data = value.data.detach()
                data.__class__ = of_device
                values[at] = torch.nn.Parameter.__new__(torch.nn.Parameter, data, value.requires_grad)
        return tree_unflatten(values, shape)

    def _move(self, tensor: torch.Tensor, to: type[DeviceTensor]) -> None:
        """A tensor or parameter goes with its data."""
        if isinstance(tensor, torch.nn.Parameter):
            tensor._is_param = True
        tensor.__class__ = to


def _on_cpu(tensor: torch.Tensor, source: torch.Tensor | None = None) -> torch.Tensor:
    """The tensor on the CPU, in memory of its own and not that of `source`."""
    with torch._C.DisableTorchFunction():
        moved = tensor.clone() if source is None or tensor.data_ptr() == source.data_ptr() else tensor
        if isinstance(moved, DeviceTensor):
            moved.__class__ = torch.Tensor
        return moved


class _Generator:
    def __new__(cls, device: Any = "cpu") -> Any:
        generator = _real_generator("cpu")
        if _names(device, "cuda"):
            _device_generators.add(generator)
        return generator


class _Nothing:
    """A stream, an event or a context that does nothing."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __getattr__(self, _: str) -> Any:
        return lambda *_, **__: None

    def __enter__(self) -> _Nothing:
        return self

    def __exit__(self, *_: Any) -> None: ...


class _Properties:
    name, major, minor, gcnArchName = "Pretend", 9, 0, ""
    total_memory, multi_processor_count = 80 * GIB, 132


def install(count: int) -> None:
    """Make this process see so many cards, from now on."""
    device = Device(count)
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    torch.Generator = _Generator
    _keep_parameters_that_are_there()
    for name, value in _answers(device).items():
        setattr(torch.cuda, name, value)
    state = torch.zeros(16, dtype=torch.uint8)
    for module in (torch.cuda, torch.cuda.random):
        module.get_rng_state, module.get_rng_state_all = _always(state), _always([state])
        module.set_rng_state, module.set_rng_state_all = _always(None), _always(None)
    torch.version.cuda = "13.0"
    torch._C._cuda_getCurrentRawStream = _always(0)  # bitsandbytes looks for it when it is imported
    torch.accelerator.is_available = lambda: False
    # accelerate takes its device from the first, optimizers ask the second whether a graph is being captured.
    torch.accelerator.current_accelerator = lambda *_, **__: torch.device("cuda")
    torch.accelerator.current_stream = lambda *_: _Nothing()
    _use_gloo()
    _load_on_device()
    # What is computed again in a backward pass says that it is on the CPU: compare the rest of it.
    checks = torch.utils.checkpoint._allowed_determinism_checks_to_fns
    checks["default"] = lambda tensor: {"shape": tensor.shape, "dtype": tensor.dtype}
    Pretend(device).__enter__()


def _keep_parameters_that_are_there() -> None:
    """Let a module that is on the device keep its parameters, or an optimizer would train others."""
    real = torch.nn.Module.to

    def to(self: Any, *args: Any, **kwargs: Any) -> Any:
        device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
        tensors = [*self.parameters(), *self.buffers()]
        is_there = all(isinstance(tensor.data, DeviceTensor) for tensor in tensors)
        if device is not None and device.type == "cuda" and dtype is None and is_there:
            return self
        return real(self, *args, **kwargs)

    torch.nn.Module.to = to  # type: ignore[assignment]


def _answers(device: Device) -> dict[str, Any]:
    """What `torch.cuda` says of an 80 GB card of which one is free."""

    quiet = (
        "synchronize", "empty_cache", "reset_peak_memory_stats", "manual_seed", "manual_seed_all", "init",
        "ipc_collect",
    )  # fmt: skip
    memory = ("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved")
    return {
        **{name: _always(None) for name in quiet}, **{name: _always(GIB) for name in memory},
        **dict.fromkeys(("Stream", "Event", "device", "stream"), _Nothing), "is_available": lambda: True,
        "is_initialized": lambda: False, "device_count": lambda: len(device.types),
        "current_device": lambda: device.chosen, "set_device": device.choose,
        "get_device_name": lambda *_: _Properties.name,
        "get_device_capability": lambda *_: (_Properties.major, _Properties.minor),
        "get_device_properties": lambda *_: _Properties, "is_bf16_supported": lambda *_, **__: True,
        "mem_get_info": lambda *_: (79 * GIB, 80 * GIB), "memory_stats": lambda *_: {},
        "current_stream": lambda *_: _Nothing(),
    }  # fmt: skip


def _always(value: Any) -> Any:
    """A function of its own: torch refuses one function under two names."""
    return lambda *_, **__: value


def _use_gloo() -> None:
    """Let processes communicate by gloo where NCCL is asked for."""
    import torch.distributed as dist

    real = dist.init_process_group

    def init_process_group(backend: Any = None, *args: Any, **kwargs: Any) -> Any:
        kwargs.pop("device_id", None)
        return real("gloo" if backend in (None, "nccl") else backend, *args, **kwargs)

    dist.init_process_group = init_process_group
    real_gather = dist.all_gather_into_tensor

    def gather(output: Any, tensor: Any, *args: Any, **kwargs: Any) -> Any:
        return real_gather(output.view(-1), tensor.reshape(-1), *args, **kwargs)  # NCCL asks for no shape

    dist.all_gather_into_tensor = dist.all_gather_single = gather


def _load_on_device() -> None:
    """Let transformers load weights on the CPU and move the model: it reads them in threads and in C++."""
    from transformers import AutoModelForCausalLM

    real = AutoModelForCausalLM.from_pretrained

    def from_pretrained(*args: Any, device_map: Any = None, **kwargs: Any) -> Any:
        loaded = real(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        if device_map:
            target = next(iter(device_map.values())) if isinstance(device_map, dict) else device_map
            model = model.to(torch.device("cuda", target) if isinstance(target, int) else target)
        return (model, *loaded[1:]) if isinstance(loaded, tuple) else model

    AutoModelForCausalLM.from_pretrained = from_pretrained
