"""Runs an ASGI application on a socket until a signal, or until the server behind it ends."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
from collections.abc import Callable
from typing import Any

from stages.engines.connections import Connections, limits
from stages.errors import ServerError

POLL_S = 1.0
"""Seconds between two looks at whether the server behind the application still runs."""
GRACE_S = 2.0
"""Seconds that open responses have at the end."""


async def serve(
    app: Any,
    bound: socket.socket,
    started: Callable[[], None],
    exit_error: Callable[[], ServerError | None],
    stopping: asyncio.Event,
) -> None:
    """Serve until a signal ends it; raise what `exit_error` returns, if it does.

    bound: a socket that does not listen yet. started: called once requests are taken. stopping: is set when
    open responses have had their time.
    """
    import uvicorn

    class Server(uvicorn.Server):
        def capture_signals(self) -> contextlib.AbstractContextManager[None]:  # type: ignore[override]
            return contextlib.nullcontext()  # uvicorn would raise them again at the end

    clients, _ = limits()
    config = uvicorn.Config(
        app, http=Connections(clients).protocol, ws="none", log_config=None, access_log=False,
        backlog=128, timeout_graceful_shutdown=int(GRACE_S) + 1, server_header=False,
    )  # fmt: skip
    # What it says are failures of single requests, of which the application has a line of its own.
    logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
    server, loop = Server(config), asyncio.get_running_loop()

    def stop() -> None:
        server.should_exit = True
        loop.call_later(GRACE_S, stopping.set)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, stop)
    serving = asyncio.create_task(server.serve(sockets=[bound]))
    while not server.started and not serving.done():
        await asyncio.wait([serving], timeout=0.05)
    if server.started:
        started()
    while not serving.done():
        await asyncio.wait([serving], timeout=POLL_S)
        if not server.should_exit and (error := exit_error()):
            stop()
            await serving
            raise error
    serving.result()
