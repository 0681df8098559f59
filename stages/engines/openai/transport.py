"""Many HTTP requests to the servers of one model, with retries and deadlines.

It tells a bad request from a dead server. If a request fails all its tries, the fault is the item's if others
were answered meanwhile or if the server still lists its models; else the server is dead. A server that lists
its models but gives no answer for `server.stall_s` seconds is dead too.
"""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from typing import Any, TypeVar

import httpx
import tenacity

from stages.config import ServerSection
from stages.engines import Failure
from stages.engines.openai.errors import ItemFailed, RequestRefused, RetryableError, seconds_of
from stages.errors import AnswerError, ConfigError, ServerError

TRIES = 6
LONGEST_WAIT_S = 60
"""Longest wait that a server may ask for by Retry-After."""
ALIVE_S = 5
REST_S = 15
LOOPBACK = ("127.0.0.1", "::1", "localhost")
Done = tuple[int, Any, asyncio.Event]
"""Index and answer of an item, and what to set when it is dealt with; -1: a worker has no more items."""
T = TypeVar("T")
R = TypeVar("R")


def asks_proxy(*urls: str) -> bool:
    """Whether the proxy that the environment names may be asked: for servers of this machine it is not."""
    return not all(httpx.URL(url).host in LOOPBACK for url in urls)


@dataclass
class Counts:
    """Numbers of requests."""

    answered: int = 0
    retried: int = 0


class Transport:
    """The servers of one model. They take requests in turn; a failed request goes to the next server."""

    def __init__(
        self,
        urls: tuple[str, ...],
        key: str,
        server: ServerSection,
        ended: Callable[[], ServerError | None] = lambda: None,
    ) -> None:
        self.urls = tuple(url.rstrip("/") for url in urls)
        self.ended = ended
        """For a server that this process started: the error if it has ended, else None."""
        self.counts = Counts()
        self.server = server
        self._key = key
        self._turn = count()
        self._rests_until: dict[str, float] = {}
        """Servers that failed, and until when the others are asked instead."""
        self._free_at = 0.0
        """When the servers may be asked again after a Retry-After."""

    def each(
        self, items: Iterable[T], ask: Callable[[Session, T], Awaitable[R]]
    ) -> Iterator[tuple[int, R | Failure]]:
        """Yield the index of each item and its answer, as soon as it is there.

        At most `server.concurrency` items are asked and not yet dealt with by the caller, who has dealt with
        one when asking for the next: a kill loses no more. `items` is read in another thread. ServerError if
        the servers are dead, ConfigError if they refuse what is asked for.
        """
        http = self._client()
        done: queue.SimpleQueue[Done] = queue.SimpleQueue()
        session = Session(self, http)
        numbered = iter(enumerate(items))
        loop = asyncio.new_event_loop()
        # In a thread of its own: a signal's exception rises in the caller's, and would be lost inside a task.
        thread = threading.Thread(target=_until_stopped, args=(loop,), name="requests", daemon=True)
        working = self.server.concurrency
        try:
            thread.start()
            for _ in range(working):
                asyncio.run_coroutine_threadsafe(_work(session, numbered, ask, done), loop)
            while working:
                i, found, dealt_with = self._next(done)
                if isinstance(found, Exception):
                    raise found
                if i < 0:
                    working -= 1
                    continue
                yield i, found
                loop.call_soon_threadsafe(dealt_with.set)
        finally:
            try:
                _stop(loop, thread, session.http)
            except BaseException:  # a signal rose here
                _stop(loop, thread, session.http)
                raise

    def one(self, ask: Callable[[Session, T], Awaitable[R]], item: T) -> R:
        """The answer to a single question; AnswerError if there is none."""
        ((_, found),) = self.each([item], ask)
        if isinstance(found, Failure):
            raise AnswerError(f"{self.urls[0]}: {found.reason}: {found.detail}")
        return found

    def singly(self) -> list[Transport]:
        """One transport for each of the servers."""
        return [Transport((url,), self._key, self.server, self.ended) for url in self.urls]

    def pick(self) -> str:
        """The next server in turn that is not resting, or the next one if all are resting."""
        at, now = next(self._turn) % len(self.urls), time.monotonic()
        turns = self.urls[at:] + self.urls[:at]
        return next((url for url in turns if self._rests_until.get(url, 0.0) <= now), turns[0])

    def rest(self, url: str) -> None:
        self._rests_until[url] = time.monotonic() + REST_S

    def _client(self) -> httpx.AsyncClient:
        # One connection per request: on a kept one, a reply that is sent twice would answer the next request.
        limits = httpx.Limits(max_connections=self.server.concurrency, max_keepalive_connections=0)
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        proxy = asks_proxy(*self.urls)
        try:
            return httpx.AsyncClient(
                headers=headers, timeout=self.server.timeout_s, limits=limits, trust_env=proxy
            )
        except (ValueError, ImportError) as error:
            raise ConfigError(
                f"the proxy that the environment names cannot be used: {error}",
                "see HTTP_PROXY, ALL_PROXY, NO_PROXY",
            ) from None

    def _next(self, done: queue.SimpleQueue[Done]) -> Done:
        try:
            return done.get(timeout=self.server.stall_s)
        except queue.Empty:
            raise ServerError(
                f"{self.urls[0]} gave no answer in {self.server.stall_s:g} s",
                "restart the server; the answers so far are kept",
            ) from None


def _until_stopped(loop: asyncio.AbstractEventLoop) -> None:
    try:
        loop.run_forever()
    finally:
        loop.close()


def _stop(loop: asyncio.AbstractEventLoop, thread: threading.Thread, http: httpx.AsyncClient) -> None:
    def begin() -> None:
        loop.create_task(_end(http)).add_done_callback(lambda _: loop.stop())

    with suppress(RuntimeError):  # it is closed
        loop.call_soon_threadsafe(begin)
    if thread.is_alive():
        thread.join()


async def _end(http: httpx.AsyncClient) -> None:
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await http.aclose()


async def _pause(seconds: float) -> None:
    await asyncio.sleep(seconds)


async def _work(
    session: Session, numbered: Iterator[tuple[int, T]], ask: Any, done: queue.SimpleQueue[Done]
) -> None:
    dealt_with = asyncio.Event()
    try:
        for i, item in numbered:
            dealt_with.clear()
            try:
                done.put((i, await ask(session, item), dealt_with))
            except ItemFailed as failed:
                done.put((i, failed.failure, dealt_with))
            await dealt_with.wait()
    except Exception as error:  # for the caller, who reads the queue
        done.put((0, error, dealt_with))
    else:
        done.put((-1, None, dealt_with))


class Session:
    """Requests of one `Transport.each`, all on one event loop."""

    def __init__(self, transport: Transport, http: httpx.AsyncClient) -> None:
        self.transport, self.http = transport, http

    async def send(self, method: str, path: str, body: dict[str, Any] | None, read: Callable[[Any], T]) -> T:
        """The JSON of a reply, passed through `read`; if that fails, the request is sent again."""
        transport = self.transport
        before = transport.counts.answered
        tries = tenacity.AsyncRetrying(
            stop=tenacity.stop_after_attempt(TRIES),
            wait=tenacity.wait_exponential_jitter(initial=0.5, max=20),
            retry=tenacity.retry_if_exception_type(RetryableError),
            before_sleep=self._retrying,
            sleep=_pause,
            reraise=True,
        )
        try:
            return await tries(self._try, method, path, body, read)
        except RetryableError as trouble:
            others = transport.counts.answered > before
            if not others and (trouble.reason in ("timeout", "transport") or not await self._alive()):
                raise ServerError(
                    f"{transport.urls[0]}/{path} does not answer: {trouble}",
                    "run the same command again; the answers so far are kept",
                ) from None
            raise ItemFailed(trouble.reason, str(trouble), trouble.busy) from None

    async def probe(self, url: str, body: dict[str, Any]) -> dict[str, Any] | None:
        """The reply to a request that a server need not understand; None if there is none."""
        try:
            async with asyncio.timeout(self.transport.server.timeout_s):
                response = await self.http.post(url, json=body)
            found = response.json()
        except (httpx.HTTPError, ValueError, RecursionError, TimeoutError):
            return None
        return found if response.status_code < 400 and isinstance(found, dict) else None

    def _retrying(self, _: object) -> None:
        self.transport.counts.retried += 1

    async def _alive(self) -> bool:
        for url in self.transport.urls:
            with suppress(httpx.HTTPError, TimeoutError):
                async with asyncio.timeout(ALIVE_S):
                    if (await self.http.get(f"{url}/models")).status_code < 400:
                        return True
        return False

    async def _try(self, method: str, path: str, body: dict[str, Any] | None, read: Any) -> Any:
        transport = self.transport
        while (pause := transport._free_at - time.monotonic()) > 0:
            await _pause(pause)
        base = transport.pick()
        url = f"{base}/{path}"
        try:
            async with asyncio.timeout(transport.server.timeout_s):  # httpx limits each part, not the whole
                response = await self.http.request(method, url, json=body)
        except (TimeoutError, httpx.TimeoutException):
            transport.rest(base)
            detail = f"no answer in {transport.server.timeout_s:g} s"
            raise RetryableError("timeout", detail, busy=True) from None
        except httpx.HTTPError as error:
            transport.rest(base)
            if ended := transport.ended():
                raise ended from None
            raise RetryableError("transport", f"{type(error).__name__} {error}".strip(), busy=True) from None
        if response.status_code >= 400:
            self._refusal(url, response)
        try:
            found = read(response.json())
        except (ValueError, RecursionError) as error:
            shown = " ".join(response.text[:120].split())
            detail = f"no readable answer: {type(error).__name__} {error}: {shown}"
            raise RetryableError("unreadable", detail) from None
        transport.counts.answered += 1
        return found

    def _refusal(self, url: str, response: httpx.Response) -> None:
        """Raise the error that a status of 400 or above stands for."""
        transport, code = self.transport, response.status_code
        text = f"{code} {' '.join(response.text[:200].split())}"
        if code in (408, 425, 429) or code >= 500:
            wait = min(seconds_of(response.headers.get("retry-after", "")), LONGEST_WAIT_S)
            transport._free_at = max(transport._free_at, time.monotonic() + wait)
            raise RetryableError("server_error", text, busy=code not in (500, 501))
        signs = ("context length", "too long", "max_model_len")
        if code in (400, 413, 422) and any(words in text.lower() for words in signs):
            raise ItemFailed("too_long", text)
        if code in (400, 413, 422) and transport.counts.answered > 1:  # one of them is the list of models
            raise ItemFailed("refused", text)
        raise RequestRefused(code, f"{url} refused: {text}")
