"""Concurrent calls in daemon threads, which do not keep the process from ending."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from contextlib import contextmanager

GRACE_S = 5
"""Seconds to wait for the other calls after an error or a signal."""


@contextmanager
def in_background(calls: Iterable[Callable[[], None]], stop: threading.Event) -> Iterator[None]:
    """Run each call in its own thread while the block runs, then wait for all of them.

    An exception in a call or in the block sets `stop`, which the other calls have to check, and is raised
    here. A call that waits for a server cannot check it: after `GRACE_S` seconds it is left to end with the
    process.
    """
    futures: list[Future[None]] = []

    def work(call: Callable[[], None], future: Future[None]) -> None:
        try:
            call()
            future.set_result(None)
        except BaseException as error:
            stop.set()
            future.set_exception(error)

    for call in calls:
        futures.append(Future())
        # A daemon thread: at exit Python waits for the threads of a ThreadPoolExecutor.
        threading.Thread(target=work, args=(call, futures[-1]), daemon=True).start()
    try:
        yield
        for future in wait(futures, return_when=FIRST_EXCEPTION).done:
            future.result()
    except BaseException:
        stop.set()
        wait(futures, GRACE_S)
        raise
