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
    asked: dict[str, Any]
    """The client's request."""

    def unsure(self) -> float:
        """1 minus the least probability of a token, the mean over answers; ValueError if that is not told."""
        least: dict[int, float] = {}
        try:
            for event in filter(None, map(self._event, self._lines())):
                for choice in event["choices"]:
                    for token in (choice.get("logprobs") or {}).get("content") or ():
                        probability = math.exp(token["logprob"])
                        least[choice["index"]] = min(probability, least.get(choice["index"], 1.0))
        except (KeyError, TypeError, AttributeError, OverflowError) as error:
            raise ValueError(f"the fast answer has no probabilities: {error!r}") from None
        if not least:
            raise ValueError("the fast answer has no probabilities")
        return 1 - fmean(least.values())

    def as_asked(self) -> bytes:
        """Return the reply without the probabilities, unless the client has asked for them."""
        if self.asked.get("logprobs"):
            return self.body
        lines = self._lines()
        for at, event in enumerate(map(self._event, lines)):
            if event:
                for choice in event["choices"]:
                    choice["logprobs"] = None
                prefix = EVENT if self.asked.get("stream") else b""
                lines[at] = prefix + json.dumps(event, ensure_ascii=False).encode()
        return b"\n".join(lines)

    def _lines(self) -> list[bytes]:
        return self.body.split(b"\n") if self.asked.get("stream") else [self.body]

    def _event(self, line: bytes) -> dict[str, Any] | None:
        """The object in a line of the reply; None if there is none, as at the end of a stream."""
        text = line.removeprefix(EVENT).strip()
        return json.loads(text) if text.startswith(b"{") else None


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
    """Failures in a row."""
    _resume_at: float = field(default=0.0, init=False)

    async def signal(self, example: Example, post: Post, held: HeldAnswer | None) -> float | None:
        """The mean of all signals on a question; None if one fails or is late, which the log tells once."""
        if time.monotonic() < self._resume_at:
            return None
        try:
            async with asyncio.timeout(VOTE_S):
                signals = await self.votes(example, post)
            signal = fmean([*signals, held.unsure()] if held else signals)
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
        return signal
