"""`lorapar serve`: a trained model by vLLM, with its modes in the chat template."""

import importlib.util
import os
import shlex
import tempfile
from pathlib import Path
from typing import Annotated

from lorapar_cli import terminal
from lorapar_cli.options import ConfigPath, Overrides, plan_of, trained, value
from stages.errors import ConfigError
from stages.pipeline.resolve import INSTALL_VLLM

KEY_ENV = "VLLM_API_KEY"
Host = Annotated[str, value(f"Address to listen on; to let other machines in, set a key in {KEY_ENV}.")]
Port = Annotated[int, value("Port to listen on.", min=1, max=65535)]


def command(config: ConfigPath, host: Host = "127.0.0.1", port: Port = 8000, set_: Overrides = None) -> None:
    settings, steps, store = plan_of(config, set_)
    if not importlib.util.find_spec("vllm"):
        raise ConfigError("lorapar serve needs vLLM, which is not installed", INSTALL_VLLM)
    if not os.environ.get(KEY_ENV) and host not in ("localhost", "127.0.0.1", "::1"):
        raise ConfigError(f"--host {host} would let anyone ask", f"set a key that clients send: {KEY_ENV}=…")
    artifact = trained(settings, store, steps)
    from stages import export
    from stages.engines import vllm
    from stages.report.card import server_command

    if not settings.served_by_vllm:
        raise ConfigError("vLLM serves no baseline, and no adapter of a 4-bit base")
    if settings.prompt_of(artifact.manifest["stage"]).template != "chat":
        raise ConfigError("a server takes chats, and the adapter learned prompts without", "lorapar ask")
    with tempfile.TemporaryDirectory(prefix="lorapar-serve-") as name:
        folder = Path(name)
        export.fill(folder, artifact, settings, "adapter")
        dtype = artifact.manifest["provenance"]["dtype"]
        arguments = shlex.split(server_command(settings, dtype, folder, merged=False))[1:]
        address = f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"
        terminal.say(f"starting vLLM, which says when {settings.run} answers at {address}; Ctrl-C ends it")
        raise SystemExit(vllm.run_server([*arguments, "--host", host, "--port", str(port)], folder))
