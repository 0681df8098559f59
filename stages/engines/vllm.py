"""A vLLM server on this machine, started for one model and always stopped."""

from __future__ import annotations

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

from stages.config import ClassifySection, ModelSection, Voter
from stages.engines.openai import Client
from stages.errors import BusyError, ServerError

HOST = "127.0.0.1"


@contextmanager
def open(model: ModelSection, voter: Voter, settings: ClassifySection, say: Callable[[str], None]) -> Iterator[Client]:
    """Start a server, wait until it is healthy, give a client, and stop it; also if this process is killed."""
    port = _port(settings.port)
    log = tempfile.NamedTemporaryFile(prefix="lorapar-vllm-", suffix=".log", delete=False)
    guard = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("guard.py")), *_command(model, settings, port)],
        stdin=subprocess.PIPE,
        stdout=log,
        stderr=subprocess.STDOUT,
        env=_environment(),
    )
    failed = True
    try:
        begun = time.monotonic()
        say(f"starting a vLLM server for {model.name}, log in {log.name}")
        _wait(guard, port, settings.startup_s, log.name)
        say(f"vLLM server ready after {time.monotonic() - begun:.0f} s")
        with Client(f"http://{HOST}:{port}/v1", None, "", settings.concurrency) as client:
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
            raise BusyError(f"classify.port {wanted} is in use", "leave it out for a free one") from None
        return int(probe.getsockname()[1])


def _command(model: ModelSection, settings: ClassifySection, port: int) -> list[str]:
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--host", HOST, "--port", str(port)]
    command += ["--model", model.name, "--max-model-len", str(settings.max_model_len)]
    if not Path(model.name).exists():
        command += ["--revision", model.revision]
    if model.dtype != "auto":
        command += ["--dtype", model.dtype]
    command += settings.vllm_args
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
    return f"its log is {log}; without vLLM: engine: transformers in classify.voters"


def _last(log: str) -> str:
    lines = [line for line in Path(log).read_text(encoding="utf-8", errors="replace").splitlines() if "Error" in line]
    return lines[-1].strip()[:300] if lines else "no error in its log"


def check(model: str) -> None:
    """Start a server for `model`, ask it one question and stop it; raises if any of this fails."""
    from stages.engines import Ballot

    settings = ClassifySection()
    with open(ModelSection(name=model), Voter(), settings, lambda text: print(text, file=sys.stderr)) as client:
        ((_, choice),) = client.choose([Ballot("Ice is", (" cold", " hot"))])
    print(f"vLLM works: it gives {choice.system2:.2f} to one of two words", file=sys.stderr)


if __name__ == "__main__":
    check(sys.argv[1])
