"""Chooses the mode of a request to `auto`: by votes of the server and, in a cascade, by the fast answer.

In a cascade the fast mode answers first, with the probability of each token. Its answer is held back until
the choice is made: it is sent if it was sure enough, else the slow mode answers.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import cached_property
from statistics import fmean
from typing import Any

from stages.records import Example

log = logging.getLogger(__name__)

VOTE_S = 1.8
"""Seconds that votes may take. Without them, the slow mode answers."""
FAILURES, PAUSE_S = 3, 10.0
"""After so many failures in a row no votes are asked for during so many seconds."""
EVENT = b"data: "
"""What a line of a stream begins with."""

Post = Callable[[str, dict[str, Any]], Awaitable[Any]]
"""Posts a body to a path below `/v1/` of the server, and returns its reply's JSON."""


@dataclass(frozen=True)
class HeldAnswer:
    """A fast answer that waits for the choice."""

    body: bytes
    """Of the reply: one object, or the events of a stream."""
    content_type: str
    keeps_probabilities: bool
    """Whether the client has asked for the probabilities."""

    @staticmethod
    def request(content: dict[str, Any]) -> dict[str, Any]:
        """A client's request, as one that asks for the probability of each token."""
        return {**content, "logprobs": True, "top_logprobs": content.get("top_logprobs") or 0}

    def uncertainty(self) -> float | None:
        """1 minus the least probability of a token, the mean over answers; None if that is not told."""
        least: dict[int, float] = {}
        try:
            for event in filter(None, self._events):
                for choice in event["choices"]:
                    for token in (choice.get("logprobs") or {}).get("content") or ():
                        probability = math.exp(token["logprob"])
                        least[choice["index"]] = min(probability, least.get(choice["index"], 1.0))
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError):
            return None
        return 1 - fmean(least.values()) if least else None

    def reply_body(self) -> bytes:
        """Return the reply without the probabilities, unless the client has asked for them."""
        if self.keeps_probabilities:
            return self.body
        lines = self._lines()
        for at, event in enumerate(self._events):
            if event:
                for choice in event["choices"]:
                    choice["logprobs"] = None
                prefix = EVENT if self._is_stream else b""
                lines[at] = prefix + json.dumps(event, ensure_ascii=False).encode()
        return b"\n".join(lines)

    @property
    def _is_stream(self) -> bool:
        return self.content_type.startswith("text/event-stream")

    def _lines(self) -> list[bytes]:
        return self.body.split(b"\n") if self._is_stream else [self.body]

    @cached_property
    def _events(self) -> list[dict[str, Any] | None]:
        """The object in each line of the reply; None if there is none, as at the end of a stream."""
        texts = (line.removeprefix(EVENT).strip() for line in self._lines())
        return [json.loads(text) if text.startswith(b"{") else None for text in texts]


@dataclass
class ModeChoice:
    """Decides between the modes, and remembers whether votes fail."""

    votes: Callable[[Example, Post], Awaitable[list[float]]]
    """Probabilities that a question is of System 2, one of each signal that the server is asked for."""
    mode_of: Callable[[float | None], str]
    """The mode for the mean of the signals, or for none."""
    cascade: bool = False
    """Whether the fast answer is one of the signals."""
    _failed: int = field(default=0, init=False)
    """Votes that failed in a row."""
    _resume_at: float = field(default=0.0, init=False)

    @property
    def is_paused(self) -> bool:
        """Whether votes have failed so often that none is asked for now."""
        return time.monotonic() < self._resume_at

    async def signal(self, example: Example, post: Post, held: HeldAnswer | None) -> float | None:
        """The mean of all signals on a question; None if one cannot be had."""
        uncertainty = held.uncertainty() if held else None
        votes = await self._votes(example, post)
        if votes is None or (self.cascade and uncertainty is None):
            return None
        return fmean(votes if uncertainty is None else [*votes, uncertainty])

    async def _votes(self, example: Example, post: Post) -> list[float] | None:
        """The votes; None if one fails or is late, which the log tells once."""
        if self.is_paused:
            return None
        try:
            async with asyncio.timeout(VOTE_S):
                votes = await self.votes(example, post)
        except Exception as error:
            self._failed += 1
            if self._failed == 1:
                reason = f"{type(error).__name__} {error}".strip()
                log.warning("auto gets no votes, and is answered by %s: %s", self.mode_of(None), reason)
            if self._failed >= FAILURES:
                self._resume_at = time.monotonic() + PAUSE_S
            return None
        if self._failed:
            log.warning("auto gets votes again")
        self._failed = 0
        return votes
