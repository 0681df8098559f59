"""Many concurrent HTTP requests to the servers of one model.

A thread runs an event loop, whose workers ask for item after item. What becomes of a single request is in
`session`. A server that lists its models but gives no answer for `server.stall_s` seconds is dead.
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
from http.cookiejar import CookieJar, DefaultCookiePolicy
from itertools import count
from typing import Any, TypeVar

import httpx

from stages.config import ServerSection
from stages.engines import Failure
from stages.engines.openai.session import ALIVE_TIMEOUT_S, ItemFailed, Session
from stages.errors import AnswerError, ConfigError, ServerError

SKIP_S = 15
"""Time for which a server that failed gets no requests if there are others."""
REQUESTS, MOST_REQUESTS = 64, 512
"""Requests in flight at first, and at most, if `server.concurrency` does not say.

A large GPU takes several hundred at a time. Each has a connection, and many systems allow a process 1,024.
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


def check_reachable(url: str) -> None:
    """Raise ServerError if nothing takes connections at this address of a server."""
    try:
        httpx.get(f"{url.rstrip('/')}/models", timeout=ALIVE_TIMEOUT_S, trust_env=uses_proxy(url))
    except (httpx.ConnectError, httpx.ConnectTimeout) as error:
        raise ServerError(f"base_url {url} cannot be reached: {error}", "start that server") from None
    except (httpx.HTTPError, ValueError, ImportError):
        return  # it may be busy; of a proxy that cannot be used the stage speaks


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
        self.answered = self.retried = 0
        """Numbers of requests."""
        self.server = server
        self.retry_after = 0.0
        """Time (of `time.monotonic`) before which no server gets a request, after a Retry-After."""
        self.most = server.concurrency or (MOST_REQUESTS if grows else REQUESTS)
        """Most requests in flight."""
        self.key = key
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
        5. When no worker finds another item, `_ask_all` says so, and that ends the generator.
        6. In every case, also on an error or a signal, running requests are cancelled and the thread joined.
        """
        outcomes: queue.SimpleQueue[Outcome] = queue.SimpleQueue()
        asking = self._ask_all(self._client(), iter(enumerate(items)), ask, outcomes)
        loop = asyncio.new_event_loop()
        # A thread of its own: a signal's exception rises in the caller's thread, and would be lost in a task.
        thread = threading.Thread(target=_run, args=(loop, asking), name="requests", daemon=True)
        try:
            thread.start()
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
                _stop(loop, thread)
            except BaseException:  # a signal's exception interrupted it
                _stop(loop, thread)
                raise

    def call(self, ask: Callable[[Session, T], Awaitable[R]], item: T) -> R:
        """Return the answer for a single item; AnswerError if it fails."""
        ((_, answer),) = self.each([item], ask)
        if isinstance(answer, Failure):
            raise AnswerError(f"{self.urls[0]}: {answer.reason}: {answer.detail}")
        return answer

    def per_server(self) -> list[Transport]:
        return [Transport((url,), self.key, self.server, self.exit_error) for url in self.urls]

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
        headers = {"Accept-Encoding": "identity"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        proxy = uses_proxy(*self.urls)
        try:
            return httpx.AsyncClient(
                headers=headers,
                cookies=CookieJar(DefaultCookiePolicy(allowed_domains=[])),
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

    async def _ask_all(
        self,
        http: httpx.AsyncClient,
        numbered: Iterator[tuple[int, T]],
        ask: Callable[[Session, T], Awaitable[R]],
        outcomes: queue.SimpleQueue[Outcome],
    ) -> None:
        """Run the workers until no item is left, and say so."""
        async with http, asyncio.TaskGroup() as tasks:
            session = Session(self, http)

            def start_worker() -> None:
                session.workers += 1
                tasks.create_task(_work(session, numbered, ask, outcomes, start_worker))

            for _ in range(self.server.concurrency or REQUESTS):
                start_worker()
        outcomes.put((-1, None, asyncio.Event()))

    def _next(self, outcomes: queue.SimpleQueue[Outcome]) -> Outcome:
        """Wait for the next outcome; ServerError after `server.stall_s` seconds without any."""
        try:
            return outcomes.get(timeout=self.server.stall_s)
        except queue.Empty:
            raise ServerError(
                f"{self.urls[0]} gave no answer in {self.server.stall_s:g} s",
                "restart the server; the answers so far are kept",
            ) from None


def _run(loop: asyncio.AbstractEventLoop, asking: Coroutine[Any, Any, None]) -> None:
    """Run the loop until the coroutine has ended, and close it."""
    for part in (asking, loop.shutdown_asyncgens()):  # the parts of a reply that was not read to its end
        with suppress(asyncio.CancelledError):
            loop.run_until_complete(part)
    loop.close()


def _stop(loop: asyncio.AbstractEventLoop, thread: threading.Thread) -> None:
    """Cancel what the loop runs, and wait for its thread. A second call does no harm."""

    def cancel_all() -> None:
        for task in asyncio.all_tasks(loop):
            task.cancel()

    with suppress(RuntimeError):  # the loop is closed already
        loop.call_soon_threadsafe(cancel_all)
    if thread.is_alive():
        thread.join()


async def _work(
    session: Session,
    numbered: Iterator[tuple[int, T]],
    ask: Callable[[Session, T], Awaitable[R]],
    outcomes: queue.SimpleQueue[Outcome],
    start_worker: Callable[[], None],
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
                    start_worker()
            await dealt_with.wait()
    except Exception as error:  # raised in the caller's thread, which reads the queue
        outcomes.put((0, error, dealt_with))
