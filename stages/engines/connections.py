"""Limits on the connections of the gateway: how many, and how long and how large their headers may be."""

from __future__ import annotations

import asyncio
import resource
from typing import Any

MAX_FILES = 65_535
"""Open files that are asked for, as many as vLLM asks for."""
RESERVED_FILES = 100
"""Files that are no connections: libraries, logs, and what is accepted at the same moment."""
MAX_HEADERS = 64 * 1024
"""Bytes of a request before its body."""
HEADERS_S = 10.0
"""Seconds that a client has to send them."""


def limits() -> tuple[int, int]:
    """Raise the limit of open files; return how many connections clients may have, and the server behind."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_FILES if hard == resource.RLIM_INFINITY else min(hard, MAX_FILES)
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    files = max(soft, wanted) - RESERVED_FILES
    return files * 2 // 3, files // 3


class Connections:
    """The open connections. One too many ends the one that has been waiting the longest for its headers."""

    def __init__(self, most: int) -> None:
        self.most = most
        self._open: set[Any] = set()
        self._waiting: dict[Any, asyncio.TimerHandle] = {}
        """Connections without a complete request, the oldest first, each with the end of its time."""

    @property
    def protocol(self) -> type[asyncio.Protocol]:
        """The class of connections for uvicorn."""
        from uvicorn.protocols.http.auto import AutoHTTPProtocol

        connections = self

        class Limited(AutoHTTPProtocol):  # type: ignore[misc, valid-type]
            received = 0
            """Bytes since the last request."""

            def connection_made(self, transport: Any) -> None:
                super().connection_made(transport)
                connections.add(self)

            def connection_lost(self, exc: Exception | None) -> None:
                connections.remove(self)
                super().connection_lost(exc)

            def data_received(self, data: bytes) -> None:
                self.received += len(data)
                super().data_received(data)
                if self.cycle is not None and not self.cycle.response_complete:  # its headers are read
                    self.received = 0
                    connections.serve(self)
                elif self.received > MAX_HEADERS:
                    self.transport.abort()
                else:
                    connections.wait(self)

        return Limited

    def add(self, connection: Any) -> None:
        self._open.add(connection)
        if len(self._open) > self.most:
            next(iter(self._waiting), connection).transport.abort()
        self.wait(connection)

    def wait(self, connection: Any) -> None:
        """Give a connection its time to send the headers of a request."""
        if connection not in self._waiting:
            loop = asyncio.get_running_loop()
            self._waiting[connection] = loop.call_later(HEADERS_S, connection.transport.abort)

    def serve(self, connection: Any) -> None:
        """Let a connection be: its request is being answered."""
        if timer := self._waiting.pop(connection, None):
            timer.cancel()

    def remove(self, connection: Any) -> None:
        self.serve(connection)
        self._open.discard(connection)
