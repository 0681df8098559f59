"""Many concurrent HTTP requests to the servers of one model, with retries and deadlines.

It tells a bad request from a dead server. If a request fails all its tries, the fault is the item's if other
requests were answered meanwhile or if the server still lists its models; else the server is dead. A server
that lists its models but gives no answer for `server.stall_s` seconds is dead too.

The package `openai` has a client too, which loses three of these promises (tried with 3.57): its time limit
is for each read, so a reply that drips in never ends it; `Retry-After` holds back only the request that got
it; and it does not check the types in a reply.
"""

from __future__ import annotations

import asyncio
import functools
import queue
import ssl
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from typing import Any, TypeVar

import httpx
import tenacity

from stages.config import ServerSection
from stages.engines import Failure
from stages.engines.openai import event_loop
from stages.engines.openai.errors import ItemFailed, RequestRefused, RetryableError, retry_after_seconds
from stages.engines.openai.schema import parse_json
from stages.errors import AnswerError, ConfigError, ServerError

TRIES = 6
MAX_RETRY_AFTER_S = 60
"""Longest wait that a server may ask for by Retry-After."""
ALIVE_TIMEOUT_S = 5
"""Time that a server has to list its models when all tries of a request have failed."""
SKIP_S = 15
"""Time for which a server that failed gets no requests if there are others."""
REQUESTS, MOST_REQUESTS = 64, 512
"""Requests in flight at first, and at most, if `server.concurrency` does not say.

A large GPU takes several hundred at a time. Each has a connection, and many systems allow a process 1,024.
"""
QUICK = 0.05
"""Share of `server.timeout_s` in which a server answers that is sent more requests at a time.

One that has as many as it can work on lets others wait, so that with each request more all take longer.
"""
LOOPBACK = ("127.0.0.1", "::1", "localhost")
Outcome = tuple[int, Any, asyncio.Event]
"""What a worker puts into the queue: index and result of an item, and the event by which it may go on.

The result is an answer, a Failure, or an exception to raise. Index -1: no worker has an item left.
"""
T = TypeVar("T")
R = TypeVar("R")


def uses_proxy(*urls: str) -> bool:
    """True if requests may go through the environment's proxy: not if all servers are on this machine."""
    return not all(httpx.URL(url).host in LOOPBACK for url in urls)


@functools.cache
def _certificates(trust_env: bool) -> ssl.SSLContext:
    """The certificates that servers are checked by; to read them takes longer than a request."""
    return httpx.create_ssl_context(trust_env=trust_env)


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
        exit_error: Callable[[], ServerError | None] = lambda: None,
        grows: bool = False,
    ) -> None:
        """grows: without `server.concurrency`, send more requests at a time as long as answers are quick."""
        self.urls = tuple(url.rstrip("/") for url in urls)
        self.exit_error = exit_error
        """For a server that this process started: the error if it has ended, else None."""
        self.counts = Counts()
        self.server = server
        self.retry_after = 0.0
        """Time (of `time.monotonic`) before which no server gets a request, after a Retry-After."""
        self.most = server.concurrency or (MOST_REQUESTS if grows else REQUESTS)
        """Most requests in flight."""
        self._key = key
        self._turn = count()
        self._skipped_until: dict[str, float] = {}
        """For each server that failed: the time until which the others get its requests."""

    def each(
        self, items: Iterable[T], ask: Callable[[Session, T], Awaitable[R]]
    ) -> Iterator[tuple[int, R | Failure]]:
        """Yield each item's index and answer as soon as it arrives.

        At most `most` items are in progress at a time: in a request, or answered and not yet dealt with. An
        item is dealt with when the caller asks for the next one, so a kill loses no more answers than that.
        ServerError if the servers are dead, ConfigError if they refuse what every item asks for.

        The order of steps:
        1. A thread runs an event loop with workers (`_work`), which take the next item from the shared
           iterator `items` (so that it is read in that thread) and ask for it. Quick answers start more.
        2. A worker puts the outcome into the queue and waits for the outcome's event.
        3. This generator, in the caller's thread, takes the outcome from the queue and yields it.
        4. When the caller comes back, it sets the event, and the worker takes its next item.
        5. The last of the workers to find no more items says so, and that ends the generator.
        6. In every case, also on an error or a signal, running requests are cancelled and the thread joined.
        """
        http = self._client()
        outcomes: queue.SimpleQueue[Outcome] = queue.SimpleQueue()
        session = Session(self, http)
        numbered = iter(enumerate(items))
        loop = asyncio.new_event_loop()
        # A thread of its own: a signal's exception rises in the caller's thread, and would be lost in a task.
        thread = threading.Thread(target=event_loop.run, args=(loop,), name="requests", daemon=True)
        session.workers = min(self.server.concurrency or REQUESTS, self.most)
        try:
            thread.start()
            for _ in range(session.workers):
                asyncio.run_coroutine_threadsafe(_work(session, numbered, ask, outcomes), loop)
            while True:
                i, answer, dealt_with = self._next(outcomes)
                if isinstance(answer, Exception):
                    raise answer
                if i < 0:
                    break
                yield i, answer
                loop.call_soon_threadsafe(dealt_with.set)  # an asyncio.Event is set in its loop's thread only
        finally:
            try:
                event_loop.stop(loop, thread, session.http)
            except BaseException:  # a signal's exception interrupted it
                event_loop.stop(loop, thread, session.http)
                raise

    def call(self, ask: Callable[[Session, T], Awaitable[R]], item: T) -> R:
        """Return the answer for a single item; AnswerError if it fails."""
        ((_, answer),) = self.each([item], ask)
        if isinstance(answer, Failure):
            raise AnswerError(f"{self.urls[0]}: {answer.reason}: {answer.detail}")
        return answer

    def per_server(self) -> list[Transport]:
        """Make one transport for each of the servers."""
        return [Transport((url,), self._key, self.server, self.exit_error) for url in self.urls]

    def pick(self) -> str:
        """Return the next server in turn that is not skipped, or the next one if all are."""
        turn, now = next(self._turn) % len(self.urls), time.monotonic()
        candidates = self.urls[turn:] + self.urls[:turn]
        return next((url for url in candidates if self._skipped_until.get(url, 0.0) <= now), candidates[0])

    def skip(self, url: str) -> None:
        self._skipped_until[url] = time.monotonic() + SKIP_S

    def _client(self) -> httpx.AsyncClient:
        # One connection per request: on one kept alive, a reply sent twice would answer the next request.
        limits = httpx.Limits(max_connections=self.most, max_keepalive_connections=0)
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        proxy = uses_proxy(*self.urls)
        try:
            return httpx.AsyncClient(
                headers=headers,
                timeout=self.server.timeout_s,
                limits=limits,
                trust_env=proxy,
                verify=_certificates(proxy),
            )
        except (ValueError, ImportError) as error:
            raise ConfigError(
                f"the proxy that the environment names cannot be used: {error}",
                "see HTTP_PROXY, ALL_PROXY, NO_PROXY",
            ) from None

    def _next(self, outcomes: queue.SimpleQueue[Outcome]) -> Outcome:
        """Wait for the next outcome; ServerError after `server.stall_s` seconds without any."""
        try:
            return outcomes.get(timeout=self.server.stall_s)
        except queue.Empty:
            raise ServerError(
                f"{self.urls[0]} gave no answer in {self.server.stall_s:g} s",
                "restart the server; the answers so far are kept",
            ) from None


async def _pause(seconds: float) -> None:
    await asyncio.sleep(seconds)


async def _work(
    session: Session, numbered: Iterator[tuple[int, T]], ask: Any, outcomes: queue.SimpleQueue[Outcome]
) -> None:
    """Ask for item after item until none is left; each must be dealt with before the next is taken.

    Workers share the iterator `numbered`. They run in one thread and await nothing between two of its items,
    so no item is taken twice.
    """
    dealt_with = asyncio.Event()
    try:
        for i, item in numbered:
            dealt_with.clear()
            asked = time.monotonic()
            try:
                outcomes.put((i, await ask(session, item), dealt_with))
            except ItemFailed as failed:
                outcomes.put((i, failed.failure, dealt_with))
            else:
                if session.may_grow(time.monotonic() - asked):
                    session.start(_work(session, numbered, ask, outcomes))
            await dealt_with.wait()
    except Exception as error:  # raised in the caller's thread, which reads the queue
        outcomes.put((0, error, dealt_with))
    else:
        session.workers -= 1
        if not session.workers:
            outcomes.put((-1, None, dealt_with))


class Session:
    """Requests of one `Transport.each`, all on one event loop."""

    def __init__(self, transport: Transport, http: httpx.AsyncClient) -> None:
        self.transport, self.http = transport, http
        self.workers = 0
        self._started: set[asyncio.Task[None]] = set()

    def may_grow(self, seconds: float) -> bool:
        """Whether one more worker may start after an answer that took so long."""
        transport = self.transport
        is_quick = seconds < QUICK * transport.server.timeout_s and not transport.counts.retried
        return is_quick and self.workers < transport.most

    def start(self, worker: Coroutine[Any, Any, None]) -> None:
        self.workers += 1
        self._started.add(asyncio.get_running_loop().create_task(worker))  # the loop itself may forget it

    async def send(self, method: str, path: str, body: dict[str, Any] | None, read: Callable[[Any], T]) -> T:
        """Send a request, and return the JSON of its reply as parsed by `read`.

        Sent again after a temporary failure, and if `read` raises ValueError, TRIES times in all. Then
        ServerError if the server is dead, else ItemFailed.
        """
        transport = self.transport
        answered = transport.counts.answered
        retrying = tenacity.AsyncRetrying(
            stop=tenacity.stop_after_attempt(TRIES),
            wait=tenacity.wait_exponential_jitter(initial=0.5, max=20),
            retry=tenacity.retry_if_exception_type(RetryableError),
            before_sleep=self._count_retry,
            sleep=_pause,
            reraise=True,
        )
        try:
            return await retrying(self._send_once, method, path, body, read)
        except RetryableError as error:
            # Answers to other requests meanwhile show that the server lives. Without any, a server that does
            # not reply at all is dead; one that replies with errors is asked for its list of models.
            others_answered = transport.counts.answered > answered
            if not others_answered and (error.reason in ("timeout", "transport") or not await self._alive()):
                raise ServerError(
                    f"{transport.urls[0]}/{path} does not answer: {error}",
                    "run the same command again; the answers so far are kept",
                ) from None
            raise ItemFailed(error.reason, str(error), error.busy) from None

    async def probe(self, url: str, body: dict[str, Any]) -> dict[str, Any] | None:
        """Send a request that a server need not understand, once; None if there is no readable reply."""
        try:
            async with asyncio.timeout(self.transport.server.timeout_s):
                response = await self.http.post(url, json=body)
            reply = parse_json(response.content)
        except (httpx.HTTPError, ValueError, RecursionError, TimeoutError):
            return None
        return reply if response.status_code < 400 and isinstance(reply, dict) else None

    def _count_retry(self, _: object) -> None:
        self.transport.counts.retried += 1

    async def _alive(self) -> bool:
        """True if any of the servers lists its models."""
        for url in self.transport.urls:
            with suppress(httpx.HTTPError, TimeoutError):
                async with asyncio.timeout(ALIVE_TIMEOUT_S):
                    if (await self.http.get(f"{url}/models")).status_code < 400:
                        return True
        return False

    async def _send_once(self, method: str, path: str, body: dict[str, Any] | None, read: Any) -> Any:
        """Send a request to the next server, and parse the reply; RetryableError if another try may help."""
        transport = self.transport
        while (seconds := transport.retry_after - time.monotonic()) > 0:
            await _pause(seconds)  # in a loop, because another request's reply may prolong it meanwhile
        base = transport.pick()
        url = f"{base}/{path}"
        try:
            # httpx limits each read and write, which a server that sends byte by byte never exceeds.
            async with asyncio.timeout(transport.server.timeout_s):
                response = await self.http.request(method, url, json=body)
        except (TimeoutError, httpx.TimeoutException):
            transport.skip(base)
            detail = f"no answer in {transport.server.timeout_s:g} s"
            raise RetryableError("timeout", detail, busy=True) from None
        except httpx.HTTPError as error:
            transport.skip(base)
            if exit_error := transport.exit_error():
                raise exit_error from None
            raise RetryableError("transport", f"{type(error).__name__} {error}".strip(), busy=True) from None
        if response.status_code >= 400:
            self._raise_for_status(url, response)
        try:
            answer = read(parse_json(response.content))
        except (ValueError, RecursionError) as error:
            beginning = " ".join(response.text[:120].split())
            detail = f"no readable answer: {type(error).__name__} {error}: {beginning}"
            raise RetryableError("unreadable", detail) from None
        transport.counts.answered += 1
        return answer

    def _raise_for_status(self, url: str, response: httpx.Response) -> None:
        """Raise the error that a status of 400 or above stands for."""
        transport, code = self.transport, response.status_code
        text = f"{code} {' '.join(response.text[:200].split())}"
        if code in (408, 425, 429) or code >= 500:
            wait = min(retry_after_seconds(response.headers.get("retry-after", "")), MAX_RETRY_AFTER_S)
            transport.retry_after = max(transport.retry_after, time.monotonic() + wait)
            raise RetryableError("server_error", text, busy=code not in (500, 501))
        signs = ("context length", "too long", "max_model_len")
        if code in (400, 413, 422) and any(words in text.lower() for words in signs):
            raise ItemFailed("too_long", text)
        # A server that has answered before refuses this item only; its list of models is one of the answers.
        if code in (400, 413, 422) and transport.counts.answered > 1:
            raise ItemFailed("refused", text)
        raise RequestRefused(code, f"{url} refused: {text}")
