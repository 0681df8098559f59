"""HTTP requests to the servers of one model, each with retries and a deadline.

It tells a bad request from a dead server. If a request fails all its tries, the fault is the item's if other
requests were answered meanwhile or if the server still lists its models; else the server is dead.

The package `openai` has a client too, which loses three of these promises (tried with 3.57): its time limit
is for each read, so a reply that drips in never ends it; `Retry-After` holds back only the request that got
it; and it does not check the types in a reply.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable
from contextlib import suppress
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any, TypeVar

import httpx
import tenacity

from stages.engines import Failure
from stages.engines.openai.replies import parse_json
from stages.errors import ConfigError, ServerError

if TYPE_CHECKING:
    from stages.engines.openai.transport import Transport

TRIES = 6
ANSWERED = (200, 201)
"""Status codes of answers. Others below 400 are of caches, proxies and redirects."""
MAX_RETRY_AFTER_S = 60
"""Longest wait that a server may ask for by Retry-After."""
ALIVE_TIMEOUT_S = 5
"""Time that a server has to list its models when all tries of a request have failed."""
MAX_REPLY = 8 * 2**20
"""Bytes of a reply: many times those of the longest answer."""
MIN_KEY = 7
"""Characters of a key that is secret; a shorter one is a placeholder, such as EMPTY or ollama."""
QUICK = 0.05
"""Share of `server.timeout_s` in which a server answers that is sent more requests at a time.

One that has as many as it can work on lets others wait, so that with each request more all take longer.
"""
T = TypeVar("T")


class RequestRefused(ConfigError):
    """The server refuses something that every request contains, such as the key or the path."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


class ItemFailed(Exception):
    """One item cannot be answered; the others can."""

    def __init__(self, reason: str, detail: str, busy: bool = False) -> None:
        """busy: a timeout or overload, which is no evidence that the server lacks a feature."""
        super().__init__(detail)
        self.failure, self.busy = Failure(reason, detail), busy


class RetryableError(ItemFailed):
    """A failure that may pass: worth another try."""


async def _pause(seconds: float) -> None:
    await asyncio.sleep(seconds)


class Session:
    """Requests of one `Transport.each`, all on one event loop."""

    def __init__(self, transport: Transport, http: httpx.AsyncClient) -> None:
        self.transport, self.http = transport, http
        self.workers = 0
        """Items that are asked for at the same time."""
        key = transport.key if len(transport.key) >= MIN_KEY else ""
        # JSON may have a backslash before a character, or its number.
        letters = (rf"(?:\\?{re.escape(letter)}|\\u{ord(letter):04x})" for letter in key)
        self._key = re.compile(("".join(letters) or "(?!)").encode(), re.IGNORECASE)

    def may_grow(self, seconds: float) -> bool:
        """Whether one more worker may start after an answer that took so long."""
        transport = self.transport
        is_quick = seconds < QUICK * transport.server.timeout_s and not transport.retried
        return is_quick and self.workers < transport.most

    async def send(self, path: str, body: dict[str, Any] | None, read: Callable[[Any], T]) -> T:
        """Send a request, a GET without a body, and return the JSON of its reply as parsed by `read`.

        Sent again after a temporary failure, and if `read` raises ValueError, TRIES times in all. Then
        ServerError if the server is dead, else ItemFailed.
        """
        transport = self.transport
        answered = transport.answered
        retrying = tenacity.AsyncRetrying(
            stop=tenacity.stop_after_attempt(TRIES),
            wait=tenacity.wait_exponential_jitter(initial=0.5, max=20),
            retry=tenacity.retry_if_exception_type(RetryableError),
            before_sleep=self._count_retry,
            sleep=_pause,
            reraise=True,
        )
        try:
            return await retrying(self._send_once, path, body, read)
        except RetryableError as error:
            # Answers to other requests meanwhile show that the server lives. Without any, a server that does
            # not reply at all is dead; one that replies with errors is asked for its list of models.
            others_answered = transport.answered > answered
            is_silent = error.failure.reason in ("timeout", "transport")
            if not others_answered and (is_silent or not await self._alive()):
                raise ServerError(
                    f"{transport.urls[0]}/{path} does not answer: {error}",
                    "run the same command again; the answers so far are kept",
                ) from None
            raise

    async def probe(self, url: str, body: dict[str, Any]) -> dict[str, Any] | None:
        """Send a request that a server need not understand, once; None if there is no readable reply."""
        try:
            async with asyncio.timeout(self.transport.server.timeout_s):
                code, _, received = await self._receive(url, body)
            reply = parse_json(received)
        except (httpx.HTTPError, ItemFailed, ValueError, RecursionError, TimeoutError):
            return None
        return reply if code in ANSWERED and isinstance(reply, dict) else None

    def _count_retry(self, _: object) -> None:
        self.transport.retried += 1

    async def _alive(self) -> bool:
        """True if any of the servers lists its models."""
        for url in self.transport.urls:
            with suppress(httpx.HTTPError, ItemFailed, TimeoutError):
                async with asyncio.timeout(ALIVE_TIMEOUT_S):
                    code, _, _ = await self._receive(f"{url}/models", None)
                    if code in ANSWERED:
                        return True
        return False

    async def _receive(self, url: str, body: dict[str, Any] | None) -> tuple[int, httpx.Headers, bytes]:
        """Send a request, and return the status, headers and text of its response.

        The text does not have the key, which a server may echo. RetryableError if it is compressed, although
        that was not asked for, or too long, of which no more than the limit is read.
        """
        received = bytearray()
        async with self.http.stream("POST" if body else "GET", url, json=body) as response:
            if response.headers.get("content-encoding", "identity") != "identity":
                raise RetryableError("unreadable", "the reply is compressed")
            async for part in response.aiter_raw():
                received += part
                if len(received) > MAX_REPLY:
                    raise RetryableError("unreadable", f"the reply is over {MAX_REPLY // 2**20} MiB")
        return response.status_code, response.headers, self._key.sub(b"***", received)

    async def _send_once(self, path: str, body: dict[str, Any] | None, read: Any) -> Any:
        """Send a request to the next server, and parse the reply; RetryableError if another try may help."""
        transport = self.transport
        while (seconds := transport.retry_after - time.monotonic()) > 0:
            await _pause(seconds)  # in a loop, because another request's reply may prolong it meanwhile
        base = transport.pick()
        url = f"{base}/{path}"
        try:
            # httpx limits each read and write, which a server that sends byte by byte never exceeds.
            async with asyncio.timeout(transport.server.timeout_s):
                code, headers, received = await self._receive(url, body)
        except (TimeoutError, httpx.TimeoutException):
            transport.skip(base)
            detail = f"no answer in {transport.server.timeout_s:g} s"
            raise RetryableError("timeout", detail, busy=True) from None
        except httpx.HTTPError as error:
            transport.skip(base)
            if exit_error := transport.exit_error():
                raise exit_error from None
            reason = self._key.sub(b"***", f"{type(error).__name__} {error}".strip().encode()).decode()
            raise RetryableError("transport", reason, busy=True) from None
        if code not in ANSWERED:
            self._raise_for_status(url, code, headers, received)
        try:
            answer = read(parse_json(received))
        except (ValueError, RecursionError) as error:
            beginning = _beginning(received, 120)
            detail = f"no readable answer: {type(error).__name__} {error}: {beginning}"
            raise RetryableError("unreadable", detail) from None
        transport.answered += 1
        return answer

    def _raise_for_status(self, url: str, code: int, headers: httpx.Headers, body: bytes) -> None:
        """Raise the error that a status stands for."""
        transport, text = self.transport, f"{code} {_beginning(body, 200)}"
        if code < 400:
            raise RetryableError("unreadable", f"no answer has this status: {text}")
        if code in (408, 425, 429) or code >= 500:
            wait = min(retry_after_seconds(headers.get("retry-after", "")), MAX_RETRY_AFTER_S)
            transport.retry_after = max(transport.retry_after, time.monotonic() + wait)
            raise RetryableError("server_error", text, busy=code not in (500, 501))
        signs = ("context length", "too long", "max_model_len")
        if code in (400, 413, 422) and any(words in text.lower() for words in signs):
            raise ItemFailed("too_long", text)
        # A server that has answered before refuses this item only; its list of models is one of the answers.
        if code in (400, 413, 422) and transport.answered > 1:
            raise ItemFailed("refused", text)
        raise RequestRefused(code, f"{url} refused: {text}")


def _beginning(body: bytes, characters: int) -> str:
    return " ".join(body.decode(errors="replace")[:characters].split())


def retry_after_seconds(header: str) -> float:
    """Parse Retry-After (seconds or an HTTP date) into seconds from now; 0 if it is neither."""
    with suppress(ValueError):
        return max(0.0, float(header))
    with suppress(ValueError, TypeError, OverflowError):
        return max(0.0, parsedate_to_datetime(header).timestamp() - time.time())
    return 0.0
