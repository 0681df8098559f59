"""Mistakes to put into lorapar, each of which leaves something on a wrong device."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from typing import Any

FAULTS = {
    "a batch of votes": (
        "stages.engines.in_process", "(prompts, self.model.device)", '(prompts, "cpu")'
    ),
    "columns of the cache": (
        "stages.engines.kv_cache", "(self.length, device=positions.device)", "(self.length)"
    ),
    "positions of new tokens": (
        "stages.engines.continuous_batching", "(values, device=self.model.device)", "(values)"
    ),
    "draws of the sampler": (
        "stages.engines.continuous_batching", "=torch.float64, device=logits.device)", "=torch.float64)"
    ),
    "the index of a sparse layer": (
        "stages.lora.adapter.elements", "mask.to(self._dense.device).flatten()", "mask.cpu().flatten()"
    ),
    "weights of rewards": ("stages.lora.grpo.zero_signal", "weights.to(rewards.device)", "weights.cpu()"),
    "targets of a packed batch": (
        "stages.packing.batch", "return torch.tensor(values, device=device)", "return torch.tensor(values)"
    ),
    "a digest of device memory": (
        "stages.lora.training.loop", "weight.detach().cpu().contiguous()", "weight.detach().contiguous()"
    ),
    "a generator of the CPU for weights of the device": (
        "stages.lora.adapter.adapter", "randn(shape, generator=generator)",
        'randn(shape, generator=generator, device="cuda")',
    ),
    "always the first card": (
        "stages.models.base", '"cuda", torch.cuda.current_device())', '"cuda", 0)'
    ),
}  # fmt: skip
"""Mistake → module, right text, wrong text."""
IN_TWO_PROCESSES = {"a digest of device memory", "always the first card"}
"""Mistakes of code that runs, or goes wrong, with several processes alone."""


def put_in(name: str) -> None:
    """Change the source of a module when it is imported; SystemExit if it has no such text."""
    sys.meta_path.insert(0, _Finder(*FAULTS[name]))


class _Finder(importlib.abc.MetaPathFinder):
    def __init__(self, module: str, right: str, wrong: str) -> None:
        self.module, self.right, self.wrong = module, right, wrong

    def find_spec(self, name: str, path: Sequence[str] | None, target: Any = None) -> Any:
        if name != self.module:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        assert spec is not None and isinstance(spec.loader, importlib.machinery.SourceFileLoader)
        loader, right, wrong = spec.loader, self.right, self.wrong

        class Changed(importlib.machinery.SourceFileLoader):
            def get_code(self, fullname: str) -> Any:
                text = self.get_source(fullname)
                if text is None or text.count(right) != 1:
                    raise SystemExit(f"{fullname} has {right!r} not once: choose another mistake")
                return self.source_to_code(text.replace(right, wrong).encode(), self.path)

        spec.loader = Changed(loader.name, loader.path)
        return spec
