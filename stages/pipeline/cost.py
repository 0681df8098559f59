"""What a step takes: seconds, and memory by what fills it."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Memory:
    """The most that is in use at once, in MiB (2²⁰ bytes): of the GPU, or without one of the process."""

    whole: float
    weights: float = 0.0
    """The base and the adapter, and a second copy where a stage holds one."""
    optimizer: float = 0.0
    """Gradients of the adapter, the moments of Adam, and which elements are packed."""
    cache: float = 0.0
    """Keys and values of answers while they are written; with vLLM on the same GPU all that it was given."""
    libraries: float = 0.0
    """What the process holds before it computes, without weights."""

    @property
    def activations(self) -> float:
        """The rest: what a forward and backward pass keep, with their buffers."""
        return max(0.0, self.whole - self.weights - self.optimizer - self.cache - self.libraries)

    def without(self, libraries: float, least: float) -> Memory:
        """Of a process that does not have some of the libraries, and needs so much to load the model."""
        held = self.libraries - libraries
        return replace(self, whole=max(self.whole, least) - libraries, libraries=held)

    def less(self, weights: float) -> Memory:
        """Of a process that holds so much less of the base."""
        return self.more(-weights)

    def more(self, weights: float = 0.0, cache: float = 0.0) -> Memory:
        """Of a process that holds so much besides."""
        held, kept = self.weights + weights, self.cache + cache
        return replace(self, whole=self.whole + weights + cache, weights=held, cache=kept)


@dataclass(frozen=True)
class Cost:
    """Of one step; None is what cannot be told: it is done elsewhere, or by code that is not ours."""

    seconds: float | None
    memory: Memory | None

    @property
    def mib(self) -> float | None:
        """The most memory in use; see `Memory`."""
        return None if self.memory is None else self.memory.whole
