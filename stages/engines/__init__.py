"""Engines answer prompts: their protocol, its requests and results, and the engine that is open now.

The module of each engine has `open_engine(spec, server, say)`, a context manager that yields an `Engine`.
"""

import gc
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, Self

from stages.config import ModelSection, ServerSection
from stages.registry import Registry
from stages.runtime import libraries

engines = Registry(
    "engine",
    {
        "openai": "stages.engines.openai",
        "transformers": "stages.engines.in_process",
        "vllm": "stages.engines.vllm",
    },
)


@dataclass(frozen=True)
class EngineSpec:
    """The model that an engine serves, and how."""

    engine: str
    model: ModelSection
    """For engine openai, `model.name` is the name under which the server serves it."""
    adapter: Path | None = None
    url: str | None = None
    """Base URL of a server that is already running."""
    api_key_env: str = ""
    vllm: dict[str, Any] = field(default_factory=dict)
    """Extra arguments of its vLLM server; they override `server.vllm`."""
    devices: str | None = None
    """The devices that the engine may see, as in CUDA_VISIBLE_DEVICES."""


@dataclass(frozen=True)
class ChoiceRequest:
    """A request for the probabilities that each of the given words comes next."""

    text: str | list[dict[str, str]] | list[int]
    """A prompt to continue, the messages of a chat, or token ids."""
    words: tuple[str, ...]
    """The words as they continue the text; for a vote, the words for System 1 and System 2."""
    max_thinking_tokens: int = 0
    """Most tokens of thinking before the choice; 0 for none."""
    temperature: float = 0.0
    seed: int = 0


@dataclass(frozen=True)
class ChoiceResult:
    probabilities: tuple[float, ...]
    """Probability of each word, relative to the other words; empty if the reply was none of them."""
    text: str = ""
    """The end of the reply, if the choice was read from its text."""


@dataclass(frozen=True)
class Failure:
    """The reason why one request has no result."""

    reason: str
    """too_long, refused, server_error, timeout, transport or unreadable."""
    detail: str


@dataclass(frozen=True)
class GenerateRequest:
    """A prompt to complete."""

    ids: list[int]
    stop: tuple[str, ...] = ()
    """Texts that end the completion, in addition to the stop tokens."""
    seed: int = 0


@dataclass(frozen=True)
class Sampling:
    max_new_tokens: int
    stop_ids: tuple[int, ...]
    temperature: float = 0.0
    """0 means greedy."""
    top_k: int = 0
    """0 means all tokens."""


@dataclass(frozen=True)
class Completion:
    ids: list[int]
    """The tokens, including the stop token if there was one."""
    complete: bool
    """Terminated by a stop token or text, not by the length limit."""
    logprobs: list[float] = field(default_factory=list)
    """Of each token, where a model in this process sampled it; else empty."""


class Engine(Protocol):
    def choose_words(self, requests: Iterable[ChoiceRequest]) -> Iterator[tuple[int, ChoiceResult | Failure]]:
        """Yield each request's index and choice as soon as it is made, in any order."""
        ...

    def generate(
        self, requests: list[GenerateRequest], sampling: Sampling
    ) -> Iterator[tuple[int, Completion]]:
        """Yield each request's index and completion as soon as it ends, in any order."""
        ...


class EngineCache:
    """Holder of the one open engine, which stays open until `close` or a request for another model."""

    def __init__(self) -> None:
        self._opened: tuple[EngineSpec, ServerSection] | None = None
        self._engine: Any = None
        self._open = ExitStack()

    def get(self, spec: EngineSpec, server: ServerSection, say: Callable[[str], None]) -> Engine:
        """Return the engine for a model, the open one if it has the same spec and settings of its server.

        Any other engine is closed first: memory may hold only one model.
        """
        if (spec, server) != self._opened:
            self.close()
            # Importing the engine's module imports transformers, which would load these for seconds.
            with libraries.hide_packages(*libraries.UNUSED):
                engine = engines.pick(spec.engine)
            self._engine = self._open.enter_context(engine.open_engine(spec, server, say))
            self._opened = spec, server
        return self._engine

    def close(self, *error: Any) -> None:
        """Close the open engine, if any; one that is closed because of an error keeps its log."""
        if self._opened is not None:
            self._engine = self._opened = None
            self._open.__exit__(*(error or (None, None, None)))
            gc.collect()  # models are in reference cycles, and the next one needs their memory

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: Any) -> None:
        self.close(*error)
