"""A vLLM server on this machine, started for one model and always stopped."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

from stages.config import ModelSection, ServerSection
from stages.engines import Ballot, Served
from stages.engines.openai import Client
from stages.errors import BusyError, ServerError
from stages.lora.adapter import save_merged

HOST = "127.0.0.1"
MODULE = "adapter"
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""The LoRA ranks that vLLM can be set to; its default of 16 refuses larger adapters."""


@contextmanager
def open(served: Served, server: ServerSection, say: Callable[[str], None]) -> Iterator[Client]:
    """Start a server, wait until it is healthy, give a client, and stop it; also if this process is killed.

    An adapter is merged into a copy of the model where that is faster (on CPU a LoRA module makes vLLM 4 times slower), or
    served as a module.
    """
    port = _port(server.port)
    log = tempfile.NamedTemporaryFile(prefix="lorapar-vllm-", suffix=".log", delete=False)
    failed = True
    with tempfile.TemporaryDirectory(prefix="lorapar-merged-") as folder:
        model, module = served.model, None
        if served.adapter is not None and (server.adapter == "module" or (server.adapter == "auto" and _have_gpu())):
            module = served.adapter
        elif served.adapter is not None:
            say(f"merging {served.adapter}")
            save_merged(model, served.adapter, Path(folder))
            model = model.model_copy(update={"name": folder})
        command = _command(model, server, port, module)
        guard = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("guard.py")), *command],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=_environment(),
        )
        try:
            begun = time.monotonic()
            say(f"starting a vLLM server for {served.model.name}, log in {log.name}")
            _wait(guard, port, server.startup_s, log.name)
            say(f"vLLM server ready after {time.monotonic() - begun:.0f} s")
            name = MODULE if module else model.name
            with Client(f"http://{HOST}:{port}/v1", name, "", server.concurrency) as client:
                yield client
            failed = False
        finally:
            assert guard.stdin is not None
            guard.stdin.close()
            guard.wait()
            log.close()
            if not failed:
                os.unlink(log.name)


def _port(wanted: int | None) -> int:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, wanted or 0))
        except OSError:
            raise BusyError(f"server.port {wanted} is in use", "leave it out for a free one") from None
        return int(probe.getsockname()[1])


def _command(model: ModelSection, server: ServerSection, port: int, module: Path | None = None) -> list[str]:
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--host", HOST, "--port", str(port)]
    command += ["--model", model.name, "--max-model-len", str(server.max_model_len)]
    if not Path(model.name).exists():
        command += ["--revision", model.revision]
    if model.dtype != "auto":
        command += ["--dtype", model.dtype]
    if module is not None:
        r = json.loads((module / "adapter_config.json").read_text(encoding="utf-8"))["r"]
        rank = next(size for size in RANKS if size >= r)
        command += ["--enable-lora", "--lora-modules", f"{MODULE}={module}", "--max-lora-rank", str(rank)]
    command += server.args
    return command if _have_gpu() else [*command, "--enforce-eager"]


def _environment() -> dict[str, str]:
    """On CPU vLLM reserves a core for itself and 4 GB of cache; a small machine has neither to spare."""
    defaults = {} if _have_gpu() else {"VLLM_CPU_NUM_OF_RESERVED_CPU": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}
    return {**defaults, "VLLM_NO_USAGE_STATS": "1", **os.environ}


def _have_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _wait(guard: subprocess.Popen[bytes], port: int, limit: float, log: str) -> None:
    deadline = time.monotonic() + limit
    while time.monotonic() < deadline:
        if guard.poll() is not None:
            raise ServerError(f"the vLLM server ended with code {guard.returncode}: {_last(log)}", _hint(log))
        try:
            if httpx.get(f"http://{HOST}:{port}/health", timeout=2).status_code == 200:
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.5)
    raise ServerError(f"the vLLM server was not ready in {limit:.0f} s: {_last(log)}", _hint(log))


def _hint(log: str) -> str:
    return f"its log is {log}; without vLLM: engine: transformers"


def _last(log: str) -> str:
    lines = [line for line in Path(log).read_text(encoding="utf-8", errors="replace").splitlines() if "Error" in line]
    return lines[-1].strip()[:300] if lines else "no error in its log"


def check(model: str) -> None:
    """Start a server for `model`, ask it one question and stop it; raises if any of this fails."""
    with open(Served("vllm", ModelSection(name=model)), ServerSection(), lambda text: print(text, file=sys.stderr)) as client:
        ((_, choice),) = client.choose([Ballot("Ice is", (" cold", " hot"))])
    print(f"vLLM works: it gives {choice.shares[1]:.2f} to one of two words", file=sys.stderr)


if __name__ == "__main__":
    check(sys.argv[1])
