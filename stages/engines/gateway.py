"""Gateway before a vLLM server: one OpenAI-compatible address for modes of a model, and `auto` among them.

A request names a mode, or `auto`, for which one is chosen. It gets the system message of its mode's
training, if it has none of its own, and the arguments of the chat template. All else passes through
unchanged. The header MODE_HEADER of a response names the mode. Limits and timeouts are uvicorn's.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from statistics import fmean
from typing import TYPE_CHECKING, Any

from stages.config import MODES
from stages.config import ROUTED as AUTO
from stages.errors import ServerError
from stages.records import Example

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response

log = logging.getLogger(__name__)

MODE_HEADER, VOTE_HEADER = "x-lorapar-mode", "x-lorapar-system2"
"""Response headers: the mode that answers and, for `auto`, the signal that it should be the slow one."""
MAX_BODY = 8 * 2**20
"""Bytes of a request: more than a million tokens, and little enough to be parsed between two answers."""
VOTE_S = 1.8
"""Seconds that votes may take. Without them, the slow mode answers."""
POLL_S = 1.0
"""Seconds between two looks at whether the server behind the gateway still runs."""

Post = Callable[[str, dict[str, Any]], Awaitable[Any]]
"""Posts a body to a path below `/v1/` of the server, and returns its reply's JSON."""


class Refusal(Exception):
    """An error that the client is told, with a status."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class ModePrompt:
    """The prompt of a mode in training, apart from the question."""

    system: str | None = None
    """System message."""
    template_arguments: dict[str, Any] = field(default_factory=dict)
    """Arguments of the chat template."""

    def applied(self, content: dict[str, Any]) -> dict[str, Any]:
        """The chat with this prompt. What it says itself counts: its system message, and each argument."""
        messages = content.get("messages")
        if not isinstance(messages, list):
            return content
        if self.template_arguments:
            arguments = self.template_arguments | (content.get("chat_template_kwargs") or {})
            content = {**content, "chat_template_kwargs": arguments}
        if self.system and not any(_role(message) in ("system", "developer") for message in messages):
            content = {**content, "messages": [{"role": "system", "content": self.system}, *messages]}
        return content


@dataclass
class Gateway:
    """The modes that it offers, and the server that answers."""

    upstream: str
    """Address of the server, without `/v1`."""
    modes: dict[str, ModePrompt]
    """The modes, each with the prompt of its training."""
    votes: Callable[[Example, Post], Awaitable[list[float]]]
    """Probabilities that a question is of System 2, one of each signal."""
    mode_of: Callable[[float | None], str]
    """The mode for the mean of the signals, or for none."""
    exit_error: Callable[[], ServerError | None]
    api_key: str = ""
    """The key that clients have to send; empty: none."""
    upstream_key: str = ""
    """The key that the server asks for."""

    def run(self, bound: socket.socket, started: Callable[[], None]) -> None:
        """Serve until a signal ends it; ServerError if the server behind it ends.

        bound: a socket that does not listen yet. started: called once requests are taken.
        """
        asyncio.run(self._run(bound, started))

    async def _run(self, bound: socket.socket, started: Callable[[], None]) -> None:
        import uvicorn

        server = uvicorn.Server(uvicorn.Config(
            self.app(), ws="none", log_config=None, access_log=False, timeout_graceful_shutdown=3
        ))  # fmt: skip
        serving = asyncio.create_task(server.serve(sockets=[bound]))
        while not server.started and not serving.done():
            await asyncio.wait([serving], timeout=0.05)
        if server.started:
            started()
        while not serving.done():
            await asyncio.wait([serving], timeout=POLL_S)
            if not server.should_exit and (error := self.exit_error()):
                server.should_exit = True
                await serving
                raise error
        serving.result()

    def app(self) -> Starlette:
        """Return the ASGI application."""
        import httpx
        from starlette.applications import Starlette
        from starlette.routing import Route

        @asynccontextmanager
        async def lifespan(app: Starlette) -> AsyncIterator[None]:
            key = {"Authorization": f"Bearer {self.upstream_key}"} if self.upstream_key else {}
            async with httpx.AsyncClient(
                base_url=self.upstream, headers=key, timeout=httpx.Timeout(None, connect=10), trust_env=False
            ) as app.state.client:
                yield

        routes = [
            Route("/health", self._models),
            Route("/v1/models", self._models),
            Route("/v1/chat/completions", self._answer, methods=["POST"]),
        ]
        return Starlette(routes=routes, lifespan=lifespan, exception_handlers={Refusal: _refused})

    def _check_key(self, request: Request) -> None:
        token = request.headers.get("authorization", "").removeprefix("Bearer ").strip()
        if self.api_key and not hmac.compare_digest(token.encode(), self.api_key.encode()):
            raise Refusal(401, "wrong or missing API key")

    async def _models(self, request: Request) -> Response:
        """List the modes and `auto`, as the server lists its models."""
        from starlette.responses import JSONResponse

        if request.url.path != "/health":
            self._check_key(request)
        listing = (await request.app.state.client.get("/v1/models")).json()
        modes = [model for model in listing["data"] if model["id"] in self.modes]
        return JSONResponse({**listing, "data": [*modes, {**modes[0], "id": AUTO, "root": AUTO}]})

    async def _answer(self, request: Request) -> Response:
        from starlette.responses import StreamingResponse

        self._check_key(request)
        content, client = await _json(request), request.app.state.client
        mode, headers = content.get("model"), {}
        if mode == AUTO:
            signal = await self._signal(question(content), client)
            mode = self.mode_of(signal)
            headers[VOTE_HEADER] = "none" if signal is None else f"{signal:.4f}"
        if mode not in self.modes:
            raise Refusal(400, f"unknown model {mode!r}; choose from {', '.join([*self.modes, AUTO])}")
        body = self.modes[mode].applied({**content, "model": mode})
        reply = await client.send(client.build_request("POST", request.url.path, json=body), stream=True)

        async def chunks() -> AsyncIterator[bytes]:
            try:
                async for chunk in reply.aiter_raw():
                    yield chunk
            finally:
                await reply.aclose()

        kept = {
            name: reply.headers[name]
            for name in ("content-type", "content-encoding")
            if name in reply.headers
        }
        return StreamingResponse(chunks(), reply.status_code, {**kept, **headers, MODE_HEADER: mode})

    async def _signal(self, example: Example, client: Any) -> float | None:
        """The mean of all signals on a question; None if one cannot be had in time."""

        async def post(path: str, body: dict[str, Any]) -> Any:
            reply = await client.post(f"/v1/{path}", json=body)
            reply.raise_for_status()
            return reply.json()

        try:
            async with asyncio.timeout(VOTE_S):
                return fmean(await self.votes(example, post))
        except Exception as error:
            log.warning("auto gets no votes, and is answered by %s: %s", MODES[1], error)
            return None


async def _json(request: Request) -> dict[str, Any]:
    """The object in the body; Refusal if there is none, or it is too long."""
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > MAX_BODY:
            raise Refusal(413, f"a request may have {MAX_BODY // 2**20} MiB")
    try:
        content = json.loads(body)
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise Refusal(400, "the body is no JSON object")
    return content


def question(content: dict[str, Any]) -> Example:
    """Return what a chat asks, as an example to vote on: its last message of the user, after earlier turns."""
    messages = content.get("messages")
    turns = (
        [(_role(message), _text(message)) for message in messages if _role(message) in ("user", "assistant")]
        if isinstance(messages, list)
        else []
    )
    asked = [i for i, (role, _) in enumerate(turns) if role == "user"]
    if not asked:
        raise Refusal(400, f"model {AUTO} needs a user message")
    earlier = [[turns[i][1], turns[i + 1][1]] for i in asked[:-1] if turns[i + 1][0] == "assistant"]
    return Example("question", turns[asked[-1]][1], "", None, turns=earlier)


def _role(message: Any) -> Any:
    return message.get("role") if isinstance(message, dict) else None


def _text(message: dict[str, Any]) -> str:
    """The text of a message, which may come in parts."""
    content = message.get("content")
    if isinstance(content, list):
        content = "\n".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
    return content.encode(errors="replace").decode() if isinstance(content, str) else ""


async def _refused(request: Request, error: Refusal) -> Response:
    """An error in OpenAI's form."""
    from starlette.responses import JSONResponse

    detail = {"message": str(error), "type": "invalid_request_error", "code": error.status}
    return JSONResponse({"error": detail}, error.status)
