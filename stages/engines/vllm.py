"""A vLLM server on this machine, started for one model and always stopped."""

from __future__ import annotations

import errno
import gc
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx

from stages.config import ModelSection, ServerSection
from stages.engines import EngineSpec
from stages.engines.openai.client import Client
from stages.errors import ConfigError, LoraparError, ServerError
from stages.models.base import save_merged
from stages.models.dtype import is_quantized, resolve, warn_if_slow
from stages.models.load_errors import config_of, positions
from stages.runtime import resources
from stages.runtime.process_guard import guarded

HOST = "127.0.0.1"
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""The values that vLLM accepts as its largest LoRA rank; its default of 16 refuses larger adapters."""
NOT_READ = ("*.bin", "*.pt", "*.pth", "*.gguf", "*.h5", "*.msgpack", "*.onnx", "original/*", "metal/*")
"""Files that vLLM does not read where there are safetensors; where there are none, it fetches them itself."""
KEY = "VLLM_API_KEY"
"""A server that is given one answers nobody without it, and this one listens to this machine alone."""

ON_CPU = {"VLLM_CPU_NUM_OF_RESERVED_CPU": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}
"""Environment of vLLM on CPU.

By default vLLM reserves a core for itself and 4 GB of cache; a small machine has neither to spare.
"""


@contextmanager
def open(served: EngineSpec, server: ServerSection, say: Callable[[str], None]) -> Iterator[Client]:
    """Start a server, wait until it is healthy, give a client, and stop it, even if this process is killed.

    `server.adapter` says whether an adapter is merged into a copy of the model or served as a LoRA module.
    `auto` merges on CPU, where a LoRA module makes vLLM 4 times slower.
    """
    _fetch(served.model, say)
    port = _port(server.port)
    with tempfile.TemporaryDirectory(prefix="lorapar-merged-") as folder:
        model, modules = served.model, {}
        as_module = server.adapter == "module" or (server.adapter == "auto" and _have_gpu())
        if served.adapter is not None and as_module:
            # Another process's server, on the same port, knows no model of this name.
            modules = {f"adapter-{os.getpid()}": served.adapter}
        elif served.adapter is not None:
            say(f"merging {served.adapter}")
            save_merged(model, served.adapter, Path(folder))
            model = model.model_copy(update={"name": folder})
        command = _command(model, server, port, served.vllm, modules)
        with _running(command, port, served.devices, server, say, served.model.name) as ended:
            yield Client((_address(port),), next(iter(modules), model.name), "", server, ended)


@contextmanager
def open_modules(
    model: ModelSection, modules: dict[str, Path], server: ServerSection, say: Callable[[str], None]
) -> Iterator[dict[str, Client]]:
    """One server for a model and several adapters of it, loaded at once: a client for each by its name.

    The model itself is served under its own name.
    """
    _fetch(model, say)
    port = _port(server.port)
    command = _command(model, server, port, {}, modules)
    with _running(command, port, None, server, say, model.name) as ended:
        yield {name: Client((_address(port),), name, "", server, ended) for name in (model.name, *modules)}


def _fetch(model: ModelSection, say: Callable[[str], None]) -> None:
    """Have the files here before the server's time to start begins: it may be an hour's download.

    What hinders it, vLLM says itself.
    """
    if model.of_hub:
        from huggingface_hub import snapshot_download

        say(f"fetching what is missing of {model.name}")
        with suppress(Exception):
            snapshot_download(model.name, revision=model.revision, ignore_patterns=list(NOT_READ))


def lora_flags(modules: dict[str, Path]) -> list[str]:
    """vLLM's arguments to serve these adapters, all at once, each as a model of that name.

    ConfigError if a rank is larger than vLLM serves.
    """
    sizes = [
        json.loads((m / "adapter_config.json").read_text(encoding="utf-8"))["r"] for m in modules.values()
    ]
    rank = next((size for size in RANKS if size >= max(sizes)), None)
    if rank is None:
        raise ConfigError(f"an adapter has rank {max(sizes)}, and vLLM serves at most {RANKS[-1]}")
    named = [f"{name}={folder}" for name, folder in modules.items()]
    loaded = ["--max-loras", str(len(modules)), "--max-lora-rank", str(rank)]
    return ["--enable-lora", "--lora-modules", *named, *loaded]


def _address(port: int) -> str:
    return f"http://{HOST}:{port}/v1"


@contextmanager
def _running(
    command: list[str],
    port: int,
    devices: str | None,
    server: ServerSection,
    say: Callable[[str], None],
    title: str,
) -> Iterator[Callable[[], ServerError | None]]:
    """The guarded server, once it is healthy; gives a call that says why it ended, if it has."""
    gc.collect()
    # The server asks for nearly all of a GPU, and this process may still hold some.
    resources.release_memory()
    log = tempfile.NamedTemporaryFile(prefix="lorapar-vllm-", suffix=".log", delete=False)
    failed = True
    guard = subprocess.Popen(
        guarded(command),
        stdin=subprocess.PIPE,
        stdout=log,
        stderr=subprocess.STDOUT,
        env=_environment(devices),
    )
    try:
        begun = time.monotonic()
        say(f"starting a vLLM server for {title}, log in {log.name}")
        _wait(guard, port, server.startup_s, log.name)
        say(f"vLLM server ready after {time.monotonic() - begun:.0f} s")
        yield lambda: _ended(guard, log.name)
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
        except OSError as error:
            taken = error.errno == errno.EADDRINUSE
            reason = "is in use" if taken else f"cannot be had: {error.strerror}"
            raise ServerError(f"server.port {wanted} {reason}", "leave it out for a free one") from None
        return int(probe.getsockname()[1])


def flags(arguments: dict[str, Any]) -> list[str]:
    """vLLM's command-line arguments: {tensor_parallel_size: 2} becomes --tensor-parallel-size 2."""
    found = []
    for name, value in arguments.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            found.append(f"--{flag}" if value else f"--no-{flag}")
        elif value is not None:
            found += [f"--{flag}", json.dumps(value) if isinstance(value, dict | list) else str(value)]
    return found


def _command(
    model: ModelSection,
    server: ServerSection,
    port: int,
    further: dict[str, Any],
    modules: dict[str, Path] | None = None,
) -> list[str]:
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    command += ["--host", HOST, "--port", str(port), "--model", model.name]
    # Without it a model's own generation settings (a repetition penalty, say) would change what is asked for.
    given: dict[str, Any] = {"max_model_len": longest(model, server, further), "generation_config": "vllm"}
    if model.of_hub:
        given["revision"] = model.revision
    # vLLM's `auto` ignores what the CPU can multiply, and makes bfloat16 of float32 on a GPU. What is stored
    # in less than 16 bits has kernels for some types only, and vLLM knows which.
    if not _have_gpu() or model.dtype != "auto" or not is_quantized(model):
        given["dtype"] = resolve(model)
        warn_if_slow(given["dtype"])
    command += flags({**given, **server.vllm, **further})
    if modules:
        command += lora_flags(modules)
    return command if _have_gpu() else [*command, "--enforce-eager"]


def longest(model: ModelSection, server: ServerSection, further: dict[str, Any]) -> int:
    """`server.max_model_len`, or what the model can read: vLLM does not start if it is asked for more.

    Unless a person tells vLLM otherwise.
    """
    if (
        "hf_overrides" in {**server.vllm, **further}
        or os.environ.get("VLLM_ALLOW_LONG_MAX_MODEL_LEN", "0") != "0"
    ):
        return server.max_model_len
    try:
        most = positions(config_of(model))
    except LoraparError:  # vLLM may know how to read it; if not, it says so
        most = None
    return min(server.max_model_len, most or server.max_model_len)


def _environment(devices: str | None) -> dict[str, str]:
    """The server's environment. By default vLLM refuses more than a few stop texts; HumanEval has ten."""
    visible = {"CUDA_VISIBLE_DEVICES": devices} if devices is not None else {}
    inherited = {name: value for name, value in os.environ.items() if name != KEY}
    return {
        **({} if _have_gpu() else ON_CPU),
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_MAX_STOP_STRINGS": "64",
        **inherited,
        **visible,
    }


def _have_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _wait(guard: subprocess.Popen[bytes], port: int, limit: float, log: str) -> None:
    deadline = time.monotonic() + limit
    while time.monotonic() < deadline:
        if ended := _ended(guard, log):
            raise ended
        try:
            if httpx.get(f"http://{HOST}:{port}/health", timeout=2, trust_env=False).status_code == 200:
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.5)
    raise ServerError(f"the vLLM server was not ready in {limit:.0f} s: {_last(log)}", _hint(log))


def _ended(guard: subprocess.Popen[bytes], log: str) -> ServerError | None:
    if guard.poll() is None:
        return None
    return ServerError(f"the vLLM server ended with code {guard.returncode}: {_last(log)}", _hint(log))


def _hint(log: str) -> str:
    return f"its log is {log}; to do without vLLM, set engine: transformers"


def _last(log: str) -> str:
    lines = Path(log).read_text(encoding="utf-8", errors="replace").splitlines()
    errors = [line for line in lines if "Error" in line]
    return errors[-1].strip()[:300] if errors else "no error in its log"
