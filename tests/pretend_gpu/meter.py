"""Counts the memory that tensors hold at a time: each storage from its first call until it is freed."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten


class Meter(TorchDispatchMode):
    """Sees every operation below autograd, those of backward passes too, and counts storages once.

    It counts tensors of the host, too, unless told that they are there: beside a large model's they are few.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._sizes: dict[int, int] = {}
        """Bytes of each storage that is alive, by the id of its object."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for value in tree_flatten(result)[0]:
            if isinstance(value, torch.Tensor):
                self._count(value)
        return result

    def _count(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = id(storage)
        if key not in self._sizes:
            self._sizes[key] = storage.nbytes()
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._free, key)

    def _free(self, key: int) -> None:
        self.live -= self._sizes.pop(key, 0)

    def on_host(self, tensor: torch.Tensor) -> None:
        """Take a tensor out of the count."""
        key = id(tensor.untyped_storage())
        self.live -= self._sizes.get(key, 0)
        self._sizes[key] = 0

    def reset_peak(self) -> None:
        self.peak = self.live
