"""Gateway before a vLLM server: one OpenAI-compatible address for modes of a model, and `auto` among them.

Requests for `auto` are answered in the mode that a callable chooses. A request to CHAT without a system
message gets that of its mode. All else passes through unchanged, in both directions. The header MODE_HEADER
of a response names the mode.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import socket
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import httpx

from stages.config import ROUTED as AUTO
from stages.errors import LoraparError, ServerError, Terminated
from stages.records import Example

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response

MODE_HEADER, VOTE_HEADER = "x-lorapar-mode", "x-lorapar-system2"
"""Response headers: the mode that answers and, for `auto`, the probability of System 2 in the vote."""
CHAT, MODELS = "/v1/chat/completions", "/v1/models"
PATHS = {
    CHAT,
    MODELS,
    "/v1/completions",
    "/v1/responses",
    "/v1/messages",
    "/tokenize",
    "/detokenize",
    "/health",
    "/version",
}
"""What clients may ask for. vLLM offers more, some of it for whoever runs it alone."""
PER_HOP = {
    "host",
    "content-length",
    "connection",
    "transfer-encoding",
    "keep-alive",
    "upgrade",
    "date",
    "server",
}
"""Headers that belong to one connection or one server, and are not passed on."""
VOTES = 64
"""Votes at the same time; each waits in a thread of its own."""
POLL_S = 1.0
"""Seconds between two looks at whether the server behind the gateway still runs."""
GRACE_S = 5
"""Seconds that open responses have at the end."""


@dataclass(frozen=True)
class Gateway:
    """The modes that it offers, and the server that answers."""

    upstream: str
    """Address of the server, without `/v1`."""
    system_messages: dict[str, str | None]
    """The modes, each with the system message of its training."""
    decide: Callable[[Example], tuple[str, float | None]]
    """From a question to its mode and the probability of System 2."""
    exit_error: Callable[[], ServerError | None]
    api_key: str = ""
    """The key that clients have to send; empty: none."""

    def run(self, listener: socket.socket, started: Callable[[], None]) -> None:
        """Serve until Ctrl-C or a signal; ServerError if the server behind it ends.

        listener: a bound socket. started: called once requests are taken.
        """
        import uvicorn

        config = uvicorn.Config(self.app(), log_level="warning", timeout_graceful_shutdown=GRACE_S)
        with contextlib.suppress(KeyboardInterrupt, Terminated):  # uvicorn sends itself what has ended it
            asyncio.run(self._serve(uvicorn.Server(config), listener, started))

    async def _serve(self, server: Any, listener: socket.socket, started: Callable[[], None]) -> None:
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        while not server.started and not serving.done():
            await asyncio.wait([serving], timeout=0.05)
        if server.started:
            started()
        while not serving.done():
            await asyncio.wait([serving], timeout=POLL_S)
            if error := self.exit_error():
                server.should_exit = True
                await serving
                raise error
        serving.result()

    def app(self) -> Starlette:
        """Return the ASGI application."""
        from starlette.applications import Starlette
        from starlette.routing import Route

        @contextlib.asynccontextmanager
        async def lifespan(app: Starlette) -> AsyncIterator[None]:
            # The server is on this machine: it limits itself, and answers take as long as they take.
            limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
            async with httpx.AsyncClient(timeout=None, limits=limits, trust_env=False) as client:
                app.state.client, app.state.votes = client, ThreadPoolExecutor(VOTES)
                yield
                app.state.votes.shutdown(wait=False, cancel_futures=True)

        return Starlette(
            routes=[Route("/{path:path}", self._answer, methods=["GET", "POST"])], lifespan=lifespan
        )

    async def _answer(self, request: Request) -> Response:
        path = request.url.path
        if path not in PATHS:
            return _refusal(f"unknown endpoint {path}", 404)
        key = request.headers.get("x-api-key", "")  # Anthropic's clients; OpenAI's send a Bearer token
        token = request.headers.get("authorization", f"Bearer {key}")
        if self.api_key and not hmac.compare_digest(token.encode(), f"Bearer {self.api_key}".encode()):
            return _refusal("wrong or missing API key", 401)
        body = await request.body()
        headers: dict[str, str] = {}
        try:
            if request.method == "POST" and "model" in (content := _json_object(body)):
                in_mode, headers = await self._with_mode(path, content, request.app.state.votes)
                body = body if in_mode == content else json.dumps(in_mode).encode()
            if path == MODELS:
                return await self._models(request)
            return await self._forward(request, body, headers)
        except ValueError as error:
            return _refusal(str(error), 400)
        except (httpx.HTTPError, LoraparError) as error:
            return _refusal(f"the server behind this gateway failed: {type(error).__name__} {error}", 502)

    async def _with_mode(
        self, path: str, content: dict[str, Any], votes: ThreadPoolExecutor
    ) -> tuple[dict[str, Any], dict[str, str]]:
        """Return the request for the server, and headers of its response; ValueError to refuse it."""
        headers = {}
        mode = content["model"]
        if mode == AUTO:
            example = question(path, content)
            mode, vote = await asyncio.get_running_loop().run_in_executor(votes, self.decide, example)
            headers[VOTE_HEADER] = "none" if vote is None else f"{vote:.4f}"
        if not isinstance(mode, str) or mode not in self.system_messages:
            raise ValueError(
                f"unknown model {mode!r}; choose from {', '.join([*self.system_messages, AUTO])}"
            )
        headers[MODE_HEADER] = mode
        content, messages = {**content, "model": mode}, content.get("messages")
        system = self.system_messages[mode]
        if path == CHAT and system and isinstance(messages, list) and not any(map(_is_system, messages)):
            content["messages"] = [{"role": "system", "content": system}, *messages]
        return content, headers

    async def _models(self, request: Request) -> Response:
        """List the modes and `auto`, as the server lists its models."""
        from starlette.responses import JSONResponse

        response = await request.app.state.client.get(f"{self.upstream}{MODELS}")
        response.raise_for_status()
        listing = response.json()
        modes = [model for model in listing["data"] if model["id"] in self.system_messages]
        listing["data"] = [*modes, {**modes[0], "id": AUTO, "root": AUTO}]
        return JSONResponse(listing)

    async def _forward(self, request: Request, body: bytes, headers: dict[str, str]) -> Response:
        """Send the request on, and the response back as it comes; a client that leaves ends both."""
        from starlette.background import BackgroundTask
        from starlette.responses import Response, StreamingResponse

        client: httpx.AsyncClient = request.app.state.client
        dropped = PER_HOP | {"authorization", "x-api-key"}
        own = {name: value for name, value in request.headers.items() if name not in dropped}
        url = httpx.URL(f"{self.upstream}{request.url.path}", query=request.url.query.encode() or None)
        sending = asyncio.create_task(
            client.send(client.build_request(request.method, url, headers=own, content=body), stream=True)
        )
        disconnected = asyncio.create_task(_client_disconnected(request))
        await asyncio.wait([sending, disconnected], return_when=asyncio.FIRST_COMPLETED)
        disconnected.cancel()
        if not sending.done():
            sending.cancel()
            return Response(status_code=499)  # nobody is there to read it
        response = sending.result()
        kept = {name: value for name, value in response.headers.items() if name not in PER_HOP}
        return StreamingResponse(
            response.aiter_raw(),
            response.status_code,
            {**kept, **headers},
            background=BackgroundTask(response.aclose),
        )


async def _client_disconnected(request: Request) -> None:
    """Wait until the client closes its connection; its request is read already."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def question(path: str, content: dict[str, Any]) -> Example:
    """Return what a chat asks, as an example to vote on: its last message of the user, after earlier turns.

    ValueError if that cannot be told.
    """
    messages = content.get("messages")
    if path != CHAT or not isinstance(messages, list):
        raise ValueError(f"model {AUTO} answers chats: POST {CHAT} with messages")
    turns = [
        (_role(message), _text(message)) for message in messages if _role(message) in ("user", "assistant")
    ]
    asked = [i for i, (role, _) in enumerate(turns) if role == "user"]
    if not asked:
        raise ValueError(f"model {AUTO} needs a user message")
    earlier = [[turns[i][1], turns[i + 1][1]] for i in asked[:-1] if turns[i + 1][0] == "assistant"]
    return Example("question", turns[asked[-1]][1], "", None, turns=earlier)


def _is_system(message: Any) -> bool:
    return _role(message) in ("system", "developer")


def _role(message: Any) -> Any:
    return message.get("role") if isinstance(message, dict) else None


def _text(message: dict[str, Any]) -> str:
    """The text of a message, which may come in parts."""
    content = message.get("content")
    if isinstance(content, list):
        parts = [part.get("text") for part in content if isinstance(part, dict)]
        return "\n".join(part for part in parts if isinstance(part, str))
    return content if isinstance(content, str) else ""


def _json_object(body: bytes) -> dict[str, Any]:
    """The object in a body; empty if there is none, which the server will say."""
    try:
        content = json.loads(body)
    except (ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _refusal(message: str, status: int) -> Response:
    """An error in OpenAI's form."""
    from starlette.responses import JSONResponse

    kind = "invalid_request_error" if status < 500 else "server_error"
    return JSONResponse({"error": {"message": message, "type": kind, "code": status}}, status)
