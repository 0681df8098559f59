"""Concurrent calls and coroutines in daemon threads, which do not keep the process from ending."""

import _thread
import asyncio
import queue
import threading
from collections.abc import Callable, Coroutine, Iterable, Iterator
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from contextlib import contextmanager, suppress
from typing import Any

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


@contextmanager
def event_loop() -> Iterator[Callable[[Callable[[], Coroutine[Any, Any, None]]], object]]:
    """Yield a function that starts a coroutine in an event loop; at the end those that still run are ended.

    The loop has a thread of its own, because a signal's exception would be lost in a task. This thread waits
    by queues alone: in a lock of `threading` a signal's exception becomes another one. It never holds the
    last reference to the loop: in `__del__` a signal's exception would be lost, too.
    """
    ready, left, ended = (queue.SimpleQueue[None]() for _ in range(3))
    stopped, is_left, tasks = asyncio.Event(), False, set[Any]()
    loops: list[asyncio.AbstractEventLoop] = []  # the one, while it runs

    def create(call: Callable[[], Coroutine[Any, Any, None]]) -> None:
        tasks.add(task := asyncio.create_task(call()))
        task.add_done_callback(tasks.discard)

    async def serve() -> None:
        if not is_left:
            await stopped.wait()
        for task in tasks:  # the loop would also cancel what they wait for, which then is never awaited
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def run() -> None:
        with asyncio.Runner() as runner:
            loops.append(runner.get_loop())
            ready.put(None)
            runner.run(serve())
        left.get()
        loops.clear()
        ended.put(None)

    def leave() -> None:
        nonlocal is_left
        is_left = True  # seen by a thread that has no loop yet
        with suppress(IndexError, RuntimeError):  # it has none yet, or has ended meanwhile
            loops[0].call_soon_threadsafe(stopped.set)
        left.put(None)
        if loops:
            ended.get()

    try:
        # `start` waits by a lock
        _thread.start_new_thread(threading.Thread(target=run, name="requests", daemon=True).start, ())
        ready.get()
        yield lambda call: loops[0].call_soon_threadsafe(create, call)
    finally:
        try:
            leave()
        finally:
            leave()  # should a signal interrupt the first
