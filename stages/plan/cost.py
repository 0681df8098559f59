"""What a step takes: seconds, and memory by what fills it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class MemoryEstimate:
    """The most that is in use at once, in MiB (2²⁰ bytes): of the GPU, or without one of the process."""

    libraries: float = 0.0
    """What the process holds before it loads a model."""
    weights: float = 0.0
    """The base and the adapter, and a second copy where a stage holds one."""
    optimizer: float = 0.0
    """Gradients of the adapter, the moments of Adam, and which elements are packed."""
    activations: float = 0.0
    """What a forward and backward pass keep, with their buffers."""
    cache: float = 0.0
    """Keys and values of answers while they are written; with vLLM on the same GPU all that it was given."""

    @property
    def total(self) -> float:
        return self.libraries + self.weights + self.optimizer + self.activations + self.cache


@dataclass(frozen=True)
class Cost:
    """Cost of one step; None is what cannot be told: it is done elsewhere, or by code that is not ours."""

    seconds: float | None = None
    memory: MemoryEstimate | None = None

    @property
    def mib(self) -> float | None:
        return None if self.memory is None else self.memory.total
