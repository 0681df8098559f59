"""Calls in threads which do not keep a process from ending."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from contextlib import contextmanager

GRACE_S = 5
"""How long an error or a signal waits for the other calls."""


@contextmanager
def in_background(calls: Iterable[Callable[[], None]], stop: threading.Event) -> Iterator[None]:
    """Make each call in a thread of its own while the block runs, and wait for them all.

    What a call or the block raises sets `stop`, which the others are to obey, and is raised here. One that
    waits for a server cannot: it has `GRACE_S` seconds, and then ends when the process does.
    """
    running = [_begun(call, stop) for call in calls]
    try:
        yield
        for done in wait(running, return_when=FIRST_EXCEPTION).done:
            done.result()
    except BaseException:
        stop.set()
        wait(running, GRACE_S)
        raise


def _begun(call: Callable[[], None], stop: threading.Event) -> Future[None]:
    done: Future[None] = Future()

    def work() -> None:
        try:
            call()
            done.set_result(None)
        except BaseException as error:
            stop.set()
            done.set_exception(error)

    # A daemon, unlike those of ThreadPoolExecutor, for which Python waits before it ends.
    threading.Thread(target=work, daemon=True).start()
    return done
