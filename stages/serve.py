"""Serve both modes of a trained model by one vLLM server, behind one OpenAI-compatible address.

A chat gets the system message and the template arguments of its mode's training, unless it has its own. All
else passes through unchanged, streams too. vLLM brings the libraries that this file imports.
"""

from __future__ import annotations

import asyncio
import hmac
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import httpx
import uvicorn
from pydantic import TypeAdapter
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from stages.config import MODES, SYSTEMS, Config, PromptSection
from stages.errors import ConfigError, ServerError

MAX_BODY = 8 * 2**20
"""Bytes of a request: more than a million tokens, and little enough to be parsed between two answers."""
POLL_S = 0.2
"""Seconds between two looks at whether the vLLM server still runs."""
Modes = dict[str, tuple[PromptSection, int]]
"""Mode, which is also its adapter's name on the server → the prompt of its training, and its system."""
ExitError = Callable[[], ServerError | None]


def modes_of(config: Config) -> Modes:
    """The modes of a trained model; ConfigError if vLLM cannot serve them, or not to chats."""
    if not config.served_by_vllm:
        raise ConfigError("vLLM serves no baseline, and no adapter of a 4-bit base")
    modes = {mode: (config.prompt_of(target), SYSTEMS[target]) for mode, target in MODES.items()}
    if others := [mode for mode, (prompt, _) in modes.items() if prompt.template != "chat"]:
        hint = "lorapar export CONFIG DIR --views says how to serve it"
        raise ConfigError(f"a server takes chats, and {others[0]} learned prompts without", hint)
    return modes


def bind(host: str, port: int) -> socket.socket:
    """A socket that does not listen yet, made before the vLLM server starts; ServerError if it cannot be."""
    bound = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    # Connections inherit it; without it a request on a connection that was used before takes 40 ms.
    bound.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    try:
        bound.bind((host, port))
    except OSError as error:
        bound.close()
        cause = f"--host {host} --port {port}: {error.strerror or error}"
        raise ServerError(cause, "another port: --port N") from None
    return bound


async def run(app: Starlette, bound: socket.socket, exit_error: ExitError, ready: Callable[[], None]) -> None:
    """Serve until a signal ends it; ServerError if the server behind it ends. ready: called at the start."""
    server = uvicorn.Server(uvicorn.Config(app, ws="none", log_config=None, timeout_graceful_shutdown=3))
    serving = asyncio.create_task(server.serve(sockets=[bound]))
    while not (server.started or serving.done()):
        await asyncio.wait([serving], timeout=POLL_S)
    if server.started:
        ready()
    while not serving.done():
        await asyncio.wait([serving], timeout=POLL_S)
        if not server.should_exit and (error := exit_error()):
            server.should_exit = True
            await serving
            raise error
    serving.result()


def application(upstream: str, upstream_key: str, modes: Modes, api_key: str) -> Starlette:
    """Make the front. upstream: the server, with `/v1`. api_key: which clients send; empty for none."""

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        key, limits = {"Authorization": f"Bearer {upstream_key}"}, httpx.Timeout(None, connect=10)
        async with httpx.AsyncClient(
            base_url=upstream, headers=key, timeout=limits, trust_env=False
        ) as client:
            app.state.client = client
            yield

    async def models(request: Request) -> Response:
        _check_key(request, api_key)
        listing = (await request.app.state.client.get("/models")).json()
        return JSONResponse({**listing, "data": [model for model in listing["data"] if model["id"] in modes]})

    async def answer(request: Request) -> Response:
        _check_key(request, api_key)
        chat, client = await _chat(request), request.app.state.client
        if (mode := chat.get("model")) not in list(modes):
            raise HTTPException(400, f"unknown model {mode!r}; choose from {', '.join(modes)}")
        body = with_prompt(chat, *modes[mode])
        reply = await client.send(client.build_request("POST", "/chat/completions", json=body), stream=True)

        async def chunks() -> AsyncIterator[bytes]:
            try:
                async for chunk in reply.aiter_bytes():
                    yield chunk
            finally:  # also if the client has gone: the server then stops writing
                await reply.aclose()

        return StreamingResponse(chunks(), reply.status_code, media_type=reply.headers.get("content-type"))

    routes = [Route("/v1/models", models), Route("/v1/chat/completions", answer, methods=["POST"])]
    return Starlette(routes=routes, lifespan=lifespan, exception_handlers={HTTPException: _openai_error})


def with_prompt(chat: dict[str, Any], prompt: PromptSection, system: int) -> dict[str, Any]:
    """The chat as in training; what it says itself counts: its system message, and each argument."""
    arguments = prompt.template_arguments(system) | (chat.get("chat_template_kwargs") or {})
    chat = {**chat, "chat_template_kwargs": arguments} if arguments else chat
    turns = messages if isinstance(messages := chat.get("messages"), list) else []
    roles = {str(turn.get("role")) for turn in turns if isinstance(turn, dict)}
    if (message := prompt.system_message(system)) and roles and not roles & {"system", "developer"}:
        chat = {**chat, "messages": [{"role": "system", "content": message}, *turns]}
    return chat


def _check_key(request: Request, api_key: str) -> None:
    token = request.headers.get("authorization", "").removeprefix("Bearer ").strip()
    if api_key and not hmac.compare_digest(token.encode(), api_key.encode()):
        raise HTTPException(401, "wrong or missing API key")


async def _chat(request: Request) -> dict[str, Any]:
    """The object in the body; HTTPException if there is none, or it is too long."""
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > MAX_BODY:
            raise HTTPException(413, f"a request may have {MAX_BODY // 2**20} MiB")
    try:
        return TypeAdapter(dict[str, Any]).validate_json(bytes(body))
    except ValueError:
        raise HTTPException(400, "the body is no JSON object") from None


async def _openai_error(request: Request, error: Any) -> Response:
    detail = {"message": error.detail, "type": "invalid_request_error", "code": error.status_code}
    return JSONResponse({"error": detail}, error.status_code)
