"""Gateway before a vLLM server: one OpenAI-compatible address for modes of a model, and `auto` among them.

Requests for `auto` are answered in the mode that a callable chooses. Everything else passes unchanged, except
that a chat without a system message gets that of its mode. The header MODE_HEADER names the mode.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import httpx

from stages.errors import ServerError
from stages.records import Example

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response

AUTO = "auto"
MODE_HEADER, VOTE_HEADER = "x-lorapar-mode", "x-lorapar-system2"
"""Response headers: the mode that answers and, for `auto`, the probability of System 2 in the vote."""
POLL_S = 1.0
"""Seconds between two looks at whether the server behind the gateway still runs."""
PER_HOP = {
    "host",
    "content-length",
    "connection",
    "transfer-encoding",
    "keep-alive",
    "upgrade",
    "content-encoding",
    "date",
    "server",
}
"""Headers that belong to one connection or one server, and are not passed on."""


@dataclass(frozen=True)
class Gateway:
    """The modes that it offers, and the server that answers."""

    upstream: str
    """Address of the server, without `/v1`."""
    system_messages: dict[str, str | None]
    """The modes, each with the system message of its training."""
    decide: Callable[[Example], tuple[str, float | None]] | None
    """From a question to its mode and the probability of System 2; None: there is no `auto`."""
    hidden: str
    """Model of the server that clients do not see."""
    exit_error: Callable[[], ServerError | None]

    def run(self, host: str, port: int, started: Callable[[], None]) -> None:
        """Serve until a signal ends it; ServerError if the server behind it ends.

        started: called once the port takes requests.
        """
        import uvicorn

        config = uvicorn.Config(self.app(), host=host, port=port, log_level="warning")
        asyncio.run(self._serve(uvicorn.Server(config), started))

    async def _serve(self, server: Any, started: Callable[[], None]) -> None:
        serving = asyncio.create_task(server.serve())
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
            # Answers take as long as they take, and the server is on this machine.
            async with httpx.AsyncClient(timeout=None, trust_env=False) as client:
                app.state.client = client
                yield

        methods = ["GET", "POST", "PUT", "DELETE", "OPTIONS", "HEAD"]
        return Starlette(routes=[Route("/{path:path}", self._answer, methods=methods)], lifespan=lifespan)

    async def _answer(self, request: Request) -> Response:
        body = await request.body()
        headers: dict[str, str] = {}
        if request.method == "POST" and (content := _json_object(body)) is not None:
            try:
                content, headers = await self._in_a_mode(request.url.path, content)
            except ValueError as error:
                return _refusal(str(error))
            body = json.dumps(content).encode()
        if request.method == "GET" and request.url.path == "/v1/models":
            return await self._models(request)
        return await self._forward(request, body, headers)

    async def _in_a_mode(self, path: str, content: dict[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
        """Return the request for the server, and headers of its response; ValueError to refuse it."""
        from starlette.concurrency import run_in_threadpool

        headers = {}
        if content.get("model") == self.hidden:
            raise ValueError(f"there is no model {self.hidden} here")
        if content.get("model") == AUTO and self.decide is not None:
            chosen, vote = await run_in_threadpool(self.decide, question(path, content))
            content = {**content, "model": chosen}
            headers[VOTE_HEADER] = "none" if vote is None else f"{vote:.4f}"
        mode = content.get("model")
        if mode not in self.system_messages:
            return content, headers
        headers[MODE_HEADER] = mode
        messages, system = content.get("messages"), self.system_messages[mode]
        if (
            system
            and isinstance(messages, list)
            and not any(_role(message) == "system" for message in messages)
        ):
            content = {**content, "messages": [{"role": "system", "content": system}, *messages]}
        return content, headers

    async def _models(self, request: Request) -> Response:
        """The server's list of models, with `auto` and without the hidden one."""
        from starlette.responses import JSONResponse

        response = await request.app.state.client.get(f"{self.upstream}/v1/models")
        listing = response.json()
        listing["data"] = [model for model in listing["data"] if model["id"] != self.hidden]
        if self.decide is not None:
            listing["data"].append({**listing["data"][0], "id": AUTO, "root": AUTO, "parent": None})
        return JSONResponse(listing, response.status_code)

    async def _forward(self, request: Request, body: bytes, headers: dict[str, str]) -> Response:
        """Send the request on, and the response back as it comes; a client that leaves ends both."""
        from starlette.background import BackgroundTask
        from starlette.responses import StreamingResponse

        client: httpx.AsyncClient = request.app.state.client
        url = httpx.URL(f"{self.upstream}{request.url.path}", query=request.url.query.encode())
        own = {name: value for name, value in request.headers.items() if name.lower() not in PER_HOP}
        try:
            response = await client.send(
                client.build_request(request.method, url, headers=own, content=body), stream=True
            )
        except httpx.HTTPError as error:
            return _refusal(f"the server behind this address does not answer: {type(error).__name__}", 502)
        kept = {name: value for name, value in response.headers.items() if name.lower() not in PER_HOP}
        return StreamingResponse(
            response.aiter_bytes(),
            response.status_code,
            {**kept, **headers},
            background=BackgroundTask(response.aclose),
        )


def question(path: str, content: dict[str, Any]) -> Example:
    """Return what a request asks, as an example to vote on; ValueError if that cannot be told."""
    messages = content.get("messages")
    if not path.endswith("/chat/completions") or not isinstance(messages, list):
        raise ValueError("model auto answers chats: POST /v1/chat/completions with messages")
    texts = [(_role(message), _text(message)) for message in messages]
    turns = [(role, text) for role, text in texts if role in ("user", "assistant")]
    if not turns or turns[-1][0] != "user":
        raise ValueError("model auto needs a chat that ends with a message of the user")
    earlier = [
        [first, second]
        for (role, first), (other, second) in zip(turns[:-1:2], turns[1:-1:2], strict=False)
        if (role, other) == ("user", "assistant")
    ]
    return Example("question", turns[-1][1], "", None, turns=earlier)


def _role(message: Any) -> Any:
    return message.get("role") if isinstance(message, dict) else None


def _text(message: Any) -> str:
    """The text of a message, which may come in parts."""
    content = message.get("content") if isinstance(message, dict) else None
    if isinstance(content, list):
        parts = [part.get("text") for part in content if isinstance(part, dict)]
        return "\n".join(part for part in parts if isinstance(part, str))
    return content if isinstance(content, str) else ""


def _json_object(body: bytes) -> dict[str, Any] | None:
    try:
        content = json.loads(body)
    except ValueError:
        return None
    return content if isinstance(content, dict) else None


def _refusal(message: str, status: int = 400) -> Response:
    """An error in OpenAI's form."""
    from starlette.responses import JSONResponse

    kind = "invalid_request_error" if status == 400 else "server_error"
    return JSONResponse({"error": {"message": message, "type": kind, "code": status}}, status)
