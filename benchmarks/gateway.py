"""Time that the gateway of `serve` adds, beside the server asked directly and nginx where it is installed.

python benchmarks/gateway.py [SECONDS] [ANSWER_MS]

A server that answers at once, or after ANSWER_MS, stands in for vLLM; votes are answered at once. For each
way and number of clients, which keep their connections: the median and the 99th percentile of a request, in
milliseconds.
"""

import asyncio
import multiprocessing
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import aiohttp
import uvicorn
from aiohttp import web

from stages.engines.chats import CHAT, ModePrompt
from stages.engines.gateway import Gateway
from stages.engines.mode_choice import ModeChoice
from stages.serve import listener

CLIENTS = (1, 16, 64)
REPLY = {"id": "x", "object": "chat.completion", "choices": [{"message": {"content": "7"}}], "vote": 0.9}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def upstream(port: int, answer_ms: int) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            while (await receive()).get("more_body"):
                pass
            if scope["path"] == CHAT:
                await asyncio.sleep(answer_ms / 1000)
            response = web.json_response(REPLY)
            headers = [(b"content-type", b"application/json")]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            await send({"type": "http.response.body", "body": response.body})

    config = uvicorn.Config(app, port=port, log_level="critical", access_log=False, lifespan="off")
    uvicorn.Server(config).run()


def gateway(port: int, behind: int) -> None:
    async def votes(example: Any, post: Any) -> list[float]:
        reply = await post("completions", {"prompt": example.prompt})
        return [float(reply["vote"])]

    modes = {"fast": ModePrompt(), "slow": ModePrompt("Think.")}
    choice = ModeChoice(votes, lambda signal: "slow")
    one = Gateway(f"http://127.0.0.1:{behind}", modes, choice, lambda: None)
    with listener("127.0.0.1", port) as bound:
        one.run(bound, lambda: None)


def nginx(port: int, behind: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "nginx.conf"
        config.write_text(
            f"daemon off; pid {folder}/pid; error_log {folder}/error; events {{ worker_connections 4096; }}\n"
            f"http {{ access_log off; client_body_temp_path {folder}; proxy_temp_path {folder};\n"
            f"upstream s {{ server 127.0.0.1:{behind}; keepalive 64; }}\n"
            f"server {{ listen 127.0.0.1:{port}; keepalive_requests 1000000; location / {{\n"
            'proxy_pass http://s; proxy_http_version 1.1; proxy_set_header Connection ""; } } }\n'
        )
        subprocess.run(["nginx", "-c", config], check=False)


async def measure(port: int, model: str, clients: int, seconds: float) -> list[float]:
    """Milliseconds of each request."""
    body = {"model": model, "messages": [{"role": "user", "content": "What is 3 + 4?"}]}
    took: list[float] = []
    end = time.perf_counter() + seconds

    async def ask(session: aiohttp.ClientSession) -> None:
        while (begun := time.perf_counter()) < end:
            async with session.post(f"http://127.0.0.1:{port}{CHAT}", json=body) as reply:
                assert reply.status == 200, await reply.text()
                await reply.read()
            took.append(1000 * (time.perf_counter() - begun))

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        await asyncio.gather(*(ask(session) for _ in range(clients)))
    return took


def started(target: Callable[..., None], *arguments: int) -> BaseProcess:
    process = multiprocessing.get_context("spawn").Process(target=target, args=arguments, daemon=True)
    process.start()
    while True:
        try:
            socket.create_connection(("127.0.0.1", arguments[0])).close()
            return process
        except OSError:
            time.sleep(0.05)


def main() -> None:
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 5.0
    answer_ms = int(sys.argv[2]) if len(sys.argv) > 2 else 0
    server, ours, other = free_port(), free_port(), free_port()
    processes = [started(upstream, server, answer_ms), started(gateway, ours, server)]
    ways = {"direct": (server, "slow"), "gateway, slow": (ours, "slow"), "gateway, auto": (ours, "auto")}
    if shutil.which("nginx"):
        processes.append(started(nginx, other, server))
        ways["nginx"] = (other, "slow")
    print(f"{'':<14} clients   p50    p99  ms")
    for clients in CLIENTS:
        for name, (port, model) in ways.items():
            took = asyncio.run(measure(port, model, clients, seconds))
            p99 = statistics.quantiles(took, n=100)[98]
            print(f"{name:<14} {clients:>7} {statistics.median(took):>5.1f} {p99:>6.1f}", flush=True)
    for process in processes:
        process.terminate()


if __name__ == "__main__":
    main()
