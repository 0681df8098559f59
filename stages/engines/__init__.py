"""Engines answer prompts. Each file has `open(served, server, say)`, a context manager of an `Engine`."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from stages.registry import Modules
from stages.runtime import libraries

if TYPE_CHECKING:
    from stages.config import ModelSection, ServerSection

engines = Modules(
    "engine",
    {
        "openai": "stages.engines.openai.client",
        "transformers": "stages.engines.in_process",
        "vllm": "stages.engines.vllm",
    },
)


@dataclass(frozen=True)
class EngineSpec:
    """What an engine is opened for."""

    engine: str
    model: ModelSection
    """For engine openai, its name is the name under which the server serves it."""
    adapter: Path | None = None
    urls: tuple[str, ...] = ()
    """Base URLs of servers that are already running."""
    api_key_env: str = ""
    vllm: dict[str, Any] = field(default_factory=dict)
    """Further arguments of its vLLM server; they override `server.vllm`."""
    devices: str | None = None
    """The devices that the engine may see, as in CUDA_VISIBLE_DEVICES."""


@dataclass(frozen=True)
class ChoiceRequest:
    """A choice to make: which of the given words comes next."""

    text: str | list[dict[str, str]] | list[int]
    """A prompt to be continued, the messages of a chat, or token ids."""
    words: tuple[str, ...]
    """The words as they continue the text; for a vote, the words for System 1 and System 2."""
    max_thinking_tokens: int = 0
    """Longest thought before the choice, in tokens."""
    temperature: float = 0.0
    seed: int = 0
    measure_mass: bool = False
    """Find out the mass of the words too, even if that takes a separate request."""


@dataclass(frozen=True)
class ChoiceResult:
    probabilities: tuple[float, ...]
    """Probability of each word relative to the other words; empty if the reply was none of them."""
    mass: float
    """Probability that any of the words comes next; -1 if the engine cannot tell."""
    text: str = ""
    """The reply, if it had to be read."""


@dataclass(frozen=True)
class Failure:
    """Why one item has no answer."""

    reason: str
    """too_long, refused, server_error, timeout, transport or unreadable."""
    detail: str


@dataclass(frozen=True)
class GenerateRequest:
    """A prompt to be answered in a model's own words."""

    ids: list[int]
    stop: tuple[str, ...] = ()
    """Texts that end the answer, in addition to the renderer's stop tokens."""
    seed: int = 0


@dataclass(frozen=True)
class Sampling:
    max_new_tokens: int
    stop_ids: tuple[int, ...]
    temperature: float = 0.0
    """0 means greedy."""
    top_p: float = 1.0
    top_k: int = 0
    """0 means all tokens."""


@dataclass(frozen=True)
class Completion:
    ids: list[int]
    """The tokens, including the stop token if there was one."""
    complete: bool
    """Ended by a stop token or text, not by the length limit."""


class Engine(Protocol):
    def choose(self, ballots: Iterable[ChoiceRequest]) -> Iterator[tuple[int, ChoiceResult | Failure]]:
        """Yield each ballot's index and choice as soon as it is made, in any order."""
        ...

    def generate(
        self, questions: list[GenerateRequest], sampling: Sampling
    ) -> Iterator[tuple[int, Completion]]:
        """Yield each question's index and answer as soon as it is made, in any order."""
        ...


SAME_PROBES = 0.8
"""Two fingerprints with at least this share of equal greedy answers are of one model.

It is below 1 because batching and hardware change single tokens.
"""


def same_model(probes: list[str], others: list[str]) -> bool:
    """Whether two lists of greedy answers to the same questions come from one model."""
    return sum(a == b for a, b in zip(probes, others, strict=True)) >= SAME_PROBES * len(probes)


class EngineCache:
    """The engine opened in this process, kept until the pool closes or another model needs its place."""

    def __init__(self) -> None:
        self._served: EngineSpec | None = None
        self._context: AbstractContextManager[Engine] | None = None
        self._engine: Engine | None = None

    def get(self, served: EngineSpec, server: ServerSection, say: Callable[[str], None]) -> Engine:
        """The engine for a model; callers that ask for the same model share it."""
        if served != self._served or self._engine is None:
            self.close()
            with libraries.hidden(*libraries.UNUSED):
                engine = engines.pick(served.engine)
            self._context = engine.open(served, server, say)
            self._engine, self._served = self._context.__enter__(), served  # type: ignore[union-attr]
        return self._engine  # type: ignore[return-value]

    def close(self, *error: Any) -> None:
        """Stop what was started; an engine that is closed because of an error keeps its log."""
        context, self._context, self._engine, self._served = self._context, None, None, None
        if context is not None:
            context.__exit__(*(error or (None, None, None)))
            gc.collect()  # a model holds itself, and the next one needs its place

    def __enter__(self) -> EngineCache:
        return self

    def __exit__(self, *error: Any) -> None:
        self.close(*error)
