"""Gateway before a vLLM server: one OpenAI-compatible address for modes of a model, and `auto` among them.

A request names a mode, or `auto`, for which one is chosen. It gets the system message of its mode's
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
import socket
import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from stages.config import MODES
from stages.config import ROUTED as AUTO
from stages.engines import asgi_server
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
from stages.engines.connections import limits
from stages.engines.mode_choice import HeldAnswer, ModeChoice
from stages.errors import ServerError

if TYPE_CHECKING:
    import aiohttp
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response

log = logging.getLogger(__name__)

MODE_HEADER, VOTE_HEADER = "x-lorapar-mode", "x-lorapar-system2"
"""Response headers: the mode that answers and, for `auto`, the signal that it should be the slow one."""
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


@dataclass
class Gateway:
    """The modes that it offers, and the server that answers."""

    upstream: str
    """Address of the server, without `/v1`."""
    modes: dict[str, ModePrompt]
    """The modes, each with the prompt of its training."""
    choice: ModeChoice
    """Chooses the mode of a request to `auto`."""
    exit_error: Callable[[], ServerError | None]
    api_key: str = ""
    """The key that clients have to send; empty: none."""
    upstream_key: str = ""
    """The key that the server asks for."""
    origins: tuple[str, ...] = ()
    """Origins of web pages that may ask; `*` for all."""
    _stopping: asyncio.Event = field(default_factory=asyncio.Event, init=False)
    """Set when open responses have had their time."""

    def run(self, bound: socket.socket, started: Callable[[], None]) -> None:
        """Serve until a signal ends it; ServerError if the server behind it ends.

        bound: a socket that does not listen yet. started: called once requests are taken.
        """
        has_uvloop = importlib.util.find_spec("uvloop")  # vLLM brings it
        loop = importlib.import_module("uvloop" if has_uvloop else "asyncio").new_event_loop
        with asyncio.Runner(loop_factory=loop) as runner:
            runner.run(asgi_server.serve(self.app(), bound, started, self.exit_error, self._stopping))

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
        if path not in ANSWERED:
            return self._response(await self._send(request, body), headers, gone)
        content = json_object(body)
        if content.get("model") == AUTO:
            return await self._in_chosen_mode(request, content, headers, gone)
        changed = self._in_mode(path, content, headers)
        body = body if changed == content else json.dumps(changed).encode()
        return self._response(await self._send(request, body), headers, gone)

    async def _in_chosen_mode(
        self, request: Request, content: dict[str, Any], headers: dict[str, str], gone: asyncio.Task[None]
    ) -> Response:
        """The response of the mode that is chosen for a request to `auto`."""
        from starlette.responses import Response

        path, fast, held = request.url.path, MODES[0], None
        example = question(path, content)
        if self.choice.cascade and not self.choice.is_paused:
            if path != CHAT:
                raise Refusal(400, f"model {AUTO} answers {CHAT} alone, where answers have probabilities")
            asked = self._in_mode(path, {**HeldAnswer.request(content), "model": fast}, headers)
            reply = await self._send(request, json.dumps(asked).encode(), {"Accept-Encoding": "identity"})
            if reply.status != 200:
                return self._response(reply, headers, gone)
            held = HeldAnswer(await reply.read(), reply.content_type, bool(content.get("logprobs")))
        signal = await self.choice.signal(example, partial(self._post, request.app.state.client), held)
        mode = self.choice.mode_of(signal)
        headers[VOTE_HEADER] = "none" if signal is None else f"{signal:.4f}"
        if held and mode == fast:
            return Response(held.reply_body(), headers=headers, media_type=held.content_type)
        changed = self._in_mode(path, {**content, "model": mode}, headers)
        return self._response(await self._send(request, json.dumps(changed).encode()), headers, gone)

    def _in_mode(self, path: str, content: dict[str, Any], headers: dict[str, str]) -> dict[str, Any]:
        """The request for the server; Refusal if it names no model that there is."""
        mode = content.get("model")
        if not isinstance(mode, str) or mode not in self.modes:
            choices = ", ".join([*self.modes, AUTO])
            name = "no model is named" if mode is None else f"unknown model {mode!r}"
            raise Refusal(400, f"{name}; choose from {choices}")
        headers[MODE_HEADER] = mode
        return in_mode(content, path, self.modes[mode])

    async def _post(self, client: aiohttp.ClientSession, path: str, body: dict[str, Any]) -> Any:
        async with client.post(f"{self.upstream}/v1/{path}", json=body) as reply:
            if reply.status != 200:
                raise ValueError(f"HTTP {reply.status}")
            return json.loads(await reply.read())

    async def _models(self, request: Request) -> Response:
        """List the modes and `auto`, as the server lists its models."""
        from starlette.responses import JSONResponse

        async with request.app.state.client.get(f"{self.upstream}{MODELS}") as reply:
            listing = json.loads(await reply.read())
        modes = [model for model in listing["data"] if model["id"] in self.modes]
        listing["data"] = [*modes, {**modes[0], "id": AUTO, "root": AUTO}]
        return JSONResponse(listing)

    async def _send(
        self, request: Request, body: bytes, extra_headers: Mapping[str, str] | None = None
    ) -> aiohttp.ClientResponse:
        """Send a request on with this body."""
        dropped = PER_HOP | {"authorization", "x-api-key"} | {name.lower() for name in extra_headers or ()}
        own = {name: value for name, value in request.headers.items() if name not in dropped}
        query = f"?{request.url.query}" if request.url.query else ""
        client: aiohttp.ClientSession = request.app.state.client
        url = f"{self.upstream}{request.url.path}{query}"
        added = ("Accept", "Accept-Encoding", "User-Agent")  # what aiohttp would add to the client's headers
        return await client.request(
            request.method,
            url,
            headers={**own, **(extra_headers or {})},
            data=body or None,
            skip_auto_headers=added,
        )

    def _response(
        self, reply: aiohttp.ClientResponse, headers: dict[str, str], gone: asyncio.Task[None]
    ) -> Response:
        """The server's reply as it comes, with these headers."""
        from starlette.responses import StreamingResponse

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
