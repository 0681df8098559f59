"""Engines answer prompts. Each file has `open(served, server, say) -> context manager`; what it gives is an `Engine`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from stages.errors import ConfigError as ConfigError
from stages.registry import Files

if TYPE_CHECKING:
    from stages.config import Config as Config
    from stages.config import ModelSection, ServerSection

engines = Files("engine", __name__, __path__, mark="open")


@dataclass(frozen=True)
class Served:
    """What an engine is opened for."""

    engine: str
    model: ModelSection
    """For engine openai its name is the one it is served under."""
    adapter: Path | None = None
    urls: tuple[str, ...] = ()
    """Base URLs of servers that run already."""
    api_key_env: str = ""
    vllm: dict[str, Any] = field(default_factory=dict)
    """Further arguments of its vLLM server, over `server.vllm`."""
    devices: str | None = None
    """The devices it may see, as in CUDA_VISIBLE_DEVICES."""


@dataclass(frozen=True)
class Ballot:
    """A choice to make: which of some words comes next."""

    text: str | list[dict[str, str]] | list[int]
    """A prompt to be continued, the messages of a chat, or token ids."""
    words: tuple[str, ...]
    """The words, as they continue the text; of a vote those for System 1 and System 2."""
    thought: int = 0
    """Longest thought in tokens before the choice."""
    temperature: float = 0.0
    seed: int = 0
    weigh: bool = False
    """Find out the mass of the words too, where that takes a question of its own."""


@dataclass(frozen=True)
class Choice:
    shares: tuple[float, ...]
    """Probability of each word among the words; empty if the reply was none of them."""
    mass: float
    """Probability of the words among all; -1 where the engine cannot tell."""
    text: str = ""
    """The reply, where it had to be read."""


@dataclass(frozen=True)
class Failure:
    """Why one item has no answer."""

    reason: str
    """too_long, refused, server_error, timeout, transport or unreadable."""
    detail: str


@dataclass(frozen=True)
class Question:
    """A prompt to be answered in a model's own words."""

    ids: list[int]
    stop: tuple[str, ...] = ()
    """Texts that end the answer, beside the renderer's stop tokens."""
    seed: int = 0


@dataclass(frozen=True)
class Sampling:
    max_new_tokens: int
    stop_ids: tuple[int, ...]
    temperature: float = 0.0
    """0 is greedy."""
    top_p: float = 1.0
    top_k: int = 0
    """0 is all tokens."""


@dataclass(frozen=True)
class Answer:
    ids: list[int]
    """The tokens, with the stop token if there was one."""
    complete: bool
    """Ended by a stop token or text, not by the longest length."""


class Engine(Protocol):
    def choose(self, ballots: Iterable[Ballot]) -> Iterator[tuple[int, Choice | Failure]]:
        """The choice for each ballot with its index, in any order, as they come."""
        ...

    def generate(self, questions: list[Question], sampling: Sampling) -> Iterator[tuple[int, Answer]]:
        """The answer to each question with its index, in any order, as they come."""
        ...


SAME_PROBES = 0.8
"""Share of equal greedy answers from which two fingerprints are of one model: batching and hardware move single tokens."""


def same_model(probes: list[str], others: list[str]) -> bool:
    """Whether two lists of greedy answers to the same questions come from one model."""
    return sum(a == b for a, b in zip(probes, others, strict=True)) >= SAME_PROBES * len(probes)


class Pool:
    """The engine opened in this process, kept until the pool closes or another model needs its place."""

    def __init__(self) -> None:
        self._served: Served | None = None
        self._context: AbstractContextManager[Engine] | None = None
        self._engine: Engine | None = None

    def get(self, served: Served, server: ServerSection, say: Callable[[str], None]) -> Engine:
        """The engine for a model; who asks for the same one shares it."""
        if served != self._served or self._engine is None:
            self.close()
            self._context = engines.pick(served.engine).open(served, server, say)
            self._engine, self._served = self._context.__enter__(), served  # type: ignore[union-attr]
        return self._engine  # type: ignore[return-value]

    def close(self, *error: Any) -> None:
        """Stop what was started; an engine that is closed by an error keeps its log."""
        context, self._context, self._engine, self._served = self._context, None, None, None
        if context is not None:
            context.__exit__(*(error or (None, None, None)))

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *error: Any) -> None:
        self.close(*error)
