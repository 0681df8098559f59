"""Gateway before a vLLM server: one OpenAI-compatible address for modes of a model, and `auto` among them.

A request names a mode, or `auto`, for which a vote chooses one. It gets the system message of its mode's
training, if it has none of its own, and the arguments of the chat template. All else passes through
unchanged, in both directions. The header MODE_HEADER of a response names the mode.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import importlib.util
import json
import logging
import signal
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from stages.config import ROUTED as AUTO
from stages.engines.chats import (
    CHAT,
    MESSAGES,
    RESPONSES,
    ModePrompt,
    Refusal,
    in_mode,
    json_object,
    question,
)
from stages.engines.connections import Connections, limits
from stages.errors import ServerError
from stages.records import Example

if TYPE_CHECKING:
    import aiohttp
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response

log = logging.getLogger(__name__)

MODE_HEADER, VOTE_HEADER = "x-lorapar-mode", "x-lorapar-system2"
"""Response headers: the mode that answers and, for `auto`, the probability of System 2 in the vote."""
MODELS, HEALTH = "/v1/models", "/health"
ANSWERED = {CHAT, RESPONSES, MESSAGES, "/v1/completions", "/tokenize", "/detokenize"}
"""Paths whose requests name a model."""
PATHS = ANSWERED | {MODELS, HEALTH, "/version", "/metrics"}
"""What clients may ask for. vLLM offers more, some of it for whoever runs it alone."""
PER_HOP = {
    "host", "content-length", "connection", "transfer-encoding", "keep-alive", "upgrade", "date", "server",
    "cookie", "set-cookie",
}  # fmt: skip
"""Headers that belong to one connection or one server, and are not passed on."""
MAX_BODY = 8 * 2**20
"""Bytes of a request: more than a million tokens, and little enough to be parsed between two answers."""
VOTE_S = 1.8
"""Seconds that a vote may take. Without one, the slow mode answers."""
FAILURES, PAUSE_S = 3, 10.0
"""After so many failed votes in a row none is asked for during so many seconds."""
POLL_S = 1.0
"""Seconds between two looks at whether the server behind the gateway still runs."""
GRACE_S = 2.0
"""Seconds that open responses have at the end."""

Post = Callable[[str, dict[str, Any]], Awaitable[Any]]
"""Posts a body to a path below `/v1/` of the server, and returns its reply's JSON."""


@dataclass
class Gateway:
    """The modes that it offers, and the server that answers."""

    upstream: str
    """Address of the server, without `/v1`."""
    modes: dict[str, ModePrompt]
    """The modes, each with the prompt of its training."""
    vote: Callable[[Example, Post], Awaitable[float]]
    """The probability that a question is of System 2."""
    mode_of: Callable[[float | None], str]
    """The mode for a vote, or for none."""
    exit_error: Callable[[], ServerError | None]
    api_key: str = ""
    """The key that clients have to send; empty: none."""
    upstream_key: str = ""
    """The key that the server asks for."""
    origins: tuple[str, ...] = ()
    """Origins of web pages that may ask; `*` for all."""
    _failed: int = field(default=0, init=False)
    """Votes that failed in a row."""
    _resume_at: float = field(default=0.0, init=False)
    _stopping: asyncio.Event = field(default_factory=asyncio.Event, init=False)
    """Set when open responses have had their time."""

    def run(self, bound: socket.socket, started: Callable[[], None]) -> None:
        """Serve until a signal ends it; ServerError if the server behind it ends.

        bound: a socket that does not listen yet. started: called once requests are taken.
        """
        has_uvloop = importlib.util.find_spec("uvloop")  # vLLM brings it
        loop = importlib.import_module("uvloop" if has_uvloop else "asyncio").new_event_loop
        with asyncio.Runner(loop_factory=loop) as runner:
            runner.run(self._serve(bound, started))

    async def _serve(self, bound: socket.socket, started: Callable[[], None]) -> None:
        import uvicorn

        class Server(uvicorn.Server):
            def capture_signals(self) -> contextlib.AbstractContextManager[None]:  # type: ignore[override]
                return contextlib.nullcontext()  # uvicorn would raise them again at the end

        clients, _ = limits()
        config = uvicorn.Config(
            self.app(), http=Connections(clients).protocol, ws="none", log_config=None, access_log=False,
            backlog=128, timeout_graceful_shutdown=int(GRACE_S) + 1, server_header=False,
        )  # fmt: skip
        # What it says are failures of single requests, of which the gateway has a line of its own.
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
        server, loop = Server(config), asyncio.get_running_loop()

        def stop() -> None:
            server.should_exit = True
            loop.call_later(GRACE_S, self._stopping.set)

        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            loop.add_signal_handler(number, stop)
        serving = asyncio.create_task(server.serve(sockets=[bound]))
        while not server.started and not serving.done():
            await asyncio.wait([serving], timeout=0.05)
        if server.started:
            started()
        while not serving.done():
            await asyncio.wait([serving], timeout=POLL_S)
            if not server.should_exit and (error := self.exit_error()):
                stop()
                await serving
                raise error
        serving.result()

    def app(self) -> Starlette:
        """Return the ASGI application."""
        import aiohttp
        from starlette.applications import Starlette
        from starlette.middleware import Middleware
        from starlette.middleware.cors import CORSMiddleware
        from starlette.routing import Route

        @contextlib.asynccontextmanager
        async def lifespan(app: Starlette) -> AsyncIterator[None]:
            async with aiohttp.ClientSession(
                # vLLM closes a connection that is idle for 5 s; a request on it would be lost.
                connector=aiohttp.TCPConnector(limit=limits()[1], keepalive_timeout=2),
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=10),
                cookie_jar=aiohttp.DummyCookieJar(),
                headers={"Authorization": f"Bearer {self.upstream_key}"} if self.upstream_key else {},
                auto_decompress=False,
            ) as client:
                app.state.client = client
                yield

        cors = Middleware(
            CORSMiddleware, allow_origins=self.origins, allow_methods=["GET", "POST"], allow_headers=["*"],
            expose_headers=[MODE_HEADER, VOTE_HEADER],
        )  # fmt: skip
        return Starlette(
            routes=[Route("/{path:path}", self._answer, methods=["GET", "POST"])],
            middleware=[cors] if self.origins else [],
            lifespan=lifespan,
        )

    async def _answer(self, request: Request) -> Response:
        """Answer one request; a client that leaves ends its vote and its answer."""
        started, headers = time.monotonic(), dict[str, str]()
        try:
            self._check_access(request)
            response = await self._unless_left(request, await _body(request), headers)
        except Refusal as error:
            response = _error(str(error), error.status)
        except Exception as error:
            log.warning("%s: %s %s", request.url.path, type(error).__name__, error)
            response = _error("the server behind this gateway does not answer", 502)
        mode = f" {headers[MODE_HEADER]}" if MODE_HEADER in headers else ""
        seconds = time.monotonic() - started
        log.info("%s %s%s %d %.2f s", request.method, request.url.path, mode, response.status_code, seconds)
        return response

    def _check_access(self, request: Request) -> None:
        """Raise Refusal for an endpoint that there is not, or a wrong key; before the body is read."""
        path, headers = request.url.path, request.headers
        if path not in PATHS:
            raise Refusal(404, f"unknown endpoint {path}")
        scheme, _, token = headers.get("authorization", "").partition(" ")
        token = token.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")  # Anthropic's
        if path != HEALTH and not hmac.compare_digest(token.encode(), self.api_key.encode()) and self.api_key:
            raise Refusal(401, "wrong or missing API key")

    async def _unless_left(self, request: Request, body: bytes, headers: dict[str, str]) -> Response:
        from starlette.responses import Response, StreamingResponse

        gone = asyncio.create_task(_client_disconnected(request))
        work = asyncio.create_task(self._respond(request, body, headers, gone))
        response = Response(status_code=499)  # nobody is there to read it
        try:
            await asyncio.wait([work, gone], return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                response = work.result()
            return response
        finally:
            work.cancel()
            if not isinstance(response, StreamingResponse):  # which watches the client itself
                gone.cancel()

    async def _respond(
        self, request: Request, body: bytes, headers: dict[str, str], gone: asyncio.Task[None]
    ) -> Response:
        """The response to a request whose body is read. headers: gets those that the gateway adds."""
        path = request.url.path
        if path == MODELS:
            return await self._models(request)
        if path in ANSWERED:
            content = json_object(body)
            changed = await self._with_mode(path, content, headers, request.app.state.client)
            body = body if changed == content else json.dumps(changed).encode()
        return await self._forward(request, body, headers, gone)

    async def _with_mode(
        self, path: str, content: dict[str, Any], headers: dict[str, str], client: aiohttp.ClientSession
    ) -> dict[str, Any]:
        """The request for the server; Refusal if it names no model that there is."""
        mode = content.get("model")
        if mode == AUTO:
            vote = await self._vote(question(path, content), client)
            mode = self.mode_of(vote)
            headers[VOTE_HEADER] = "none" if vote is None else f"{vote:.4f}"
        if not isinstance(mode, str) or mode not in self.modes:
            choices = ", ".join([*self.modes, AUTO])
            name = "no model is named" if mode is None else f"unknown model {mode!r}"
            raise Refusal(400, f"{name}; choose from {choices}")
        headers[MODE_HEADER] = mode
        return in_mode({**content, "model": mode}, path, self.modes[mode])

    async def _vote(self, example: Example, client: aiohttp.ClientSession) -> float | None:
        """The vote on a question; None if there is none in time, which the log tells once."""

        async def post(path: str, body: dict[str, Any]) -> Any:
            async with client.post(f"{self.upstream}/v1/{path}", json=body) as reply:
                if reply.status != 200:
                    raise ValueError(f"HTTP {reply.status}")
                return json.loads(await reply.read())

        if time.monotonic() < self._resume_at:
            return None
        try:
            async with asyncio.timeout(VOTE_S):
                vote = await self.vote(example, post)
        except Exception as error:
            self._failed += 1
            if self._failed == 1:
                reason = f"{type(error).__name__} {error}".strip()
                log.warning("auto gets no votes, and is answered by %s: %s", self.mode_of(None), reason)
            if self._failed >= FAILURES:
                self._resume_at = time.monotonic() + PAUSE_S
            return None
        if self._failed:
            log.warning("auto gets votes again")
        self._failed = 0
        return vote

    async def _models(self, request: Request) -> Response:
        """List the modes and `auto`, as the server lists its models."""
        from starlette.responses import JSONResponse

        async with request.app.state.client.get(f"{self.upstream}{MODELS}") as reply:
            listing = json.loads(await reply.read())
        modes = [model for model in listing["data"] if model["id"] in self.modes]
        listing["data"] = [*modes, {**modes[0], "id": AUTO, "root": AUTO}]
        return JSONResponse(listing)

    async def _forward(
        self, request: Request, body: bytes, headers: dict[str, str], gone: asyncio.Task[None]
    ) -> Response:
        """Send the request on, and the response back as it comes."""
        from starlette.responses import StreamingResponse

        dropped = PER_HOP | {"authorization", "x-api-key"}
        own = {name: value for name, value in request.headers.items() if name not in dropped}
        query = f"?{request.url.query}" if request.url.query else ""
        client: aiohttp.ClientSession = request.app.state.client
        url = f"{self.upstream}{request.url.path}{query}"
        added = ("Accept", "Accept-Encoding", "User-Agent")  # what aiohttp would add to the client's headers
        reply = await client.request(
            request.method, url, headers=own, data=body or None, skip_auto_headers=added
        )
        kept = {name: value for name, value in reply.headers.items() if name.lower() not in PER_HOP}
        return StreamingResponse(self._chunks(reply, gone), reply.status, {**kept, **headers})

    async def _chunks(self, reply: aiohttp.ClientResponse, gone: asyncio.Task[None]) -> AsyncIterator[bytes]:
        """The parts of a response, until the client leaves or the gateway ends."""
        stopping = asyncio.create_task(self._stopping.wait())
        try:
            while True:
                part = asyncio.ensure_future(reply.content.readany())
                await asyncio.wait([part, gone, stopping], return_when=asyncio.FIRST_COMPLETED)
                if not part.done():
                    part.cancel()
                    raise ConnectionAbortedError  # so that the client sees that its answer is cut
                if not (data := part.result()):
                    return
                yield data
        finally:
            stopping.cancel()
            gone.cancel()
            reply.close() if not reply.content.at_eof() else reply.release()


async def _body(request: Request) -> bytes:
    """The body of a request; Refusal if it is too long, without reading all of it."""
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > MAX_BODY:
            raise Refusal(413, f"a request may have {MAX_BODY // 2**20} MiB")
    return bytes(body)


async def _client_disconnected(request: Request) -> None:
    """Wait until the client closes its connection; its request is read already."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _error(message: str, status: int) -> Response:
    """An error in OpenAI's form."""
    from starlette.responses import JSONResponse

    kind = "invalid_request_error" if status < 500 else "server_error"
    return JSONResponse({"error": {"message": message, "type": kind, "code": status}}, status)
