"""An event loop in a thread of its own: its run, and its end with all that it runs."""

from __future__ import annotations

import asyncio
import threading
from contextlib import suppress

import httpx


def run(loop: asyncio.AbstractEventLoop) -> None:
    """Run the loop until it is stopped, and close it."""
    try:
        loop.run_forever()
    finally:
        loop.close()


def stop(loop: asyncio.AbstractEventLoop, thread: threading.Thread, http: httpx.AsyncClient) -> None:
    """Cancel what the loop runs, stop it, and wait for its thread. A second call does no harm."""

    def begin() -> None:
        loop.create_task(_cancel_all(http)).add_done_callback(lambda _: loop.stop())

    with suppress(RuntimeError):  # the loop is closed already
        loop.call_soon_threadsafe(begin)
    if thread.is_alive():
        thread.join()


async def _cancel_all(http: httpx.AsyncClient) -> None:
    """Cancel the workers, wait for their ends, then close their connections."""
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await http.aclose()
