"""`lorapar serve`: both modes of a trained model, and `auto`, behind one OpenAI-compatible address."""

import importlib.util
import ipaddress
import os
from typing import Annotated

import typer

from lorapar_cli import terminal
from lorapar_cli.options import ConfigPath, Overrides, plan_of
from lorapar_cli.progress import TerminalProgress
from stages.data.rows import missing_path_error
from stages.errors import ConfigError
from stages.pipeline import external_key
from stages.pipeline.resolve import INSTALL_VLLM
from stages.pipeline.state import require_current
from stages.pipeline.steps import digest_cache
from stages.store.artifacts import Store

EXAMPLE = """\
curl -i {address}/chat/completions{key} -H 'Content-Type: application/json' \\
  -d '{{"model": "auto", "messages": [{{"role": "user", "content": "What is 3 + 4?"}}]}}'"""
KEY_ENV = "VLLM_API_KEY"


def command(
    config: ConfigPath,
    host: Annotated[
        str, typer.Option(help=f"Address to listen on; to let other machines in, set a key in {KEY_ENV}.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.", min=1, max=65535)] = 8000,
    set_: Overrides = None,
) -> None:
    settings, steps = plan_of(config, set_)
    if not importlib.util.find_spec("vllm"):
        raise ConfigError("lorapar serve needs vLLM, which is not installed", INSTALL_VLLM)
    from stages import serve

    needed = serve.needed_steps(settings)
    if not set(needed) <= set(steps):
        raise missing_path_error()
    key = os.environ.get(KEY_ENV, "")
    if not key and not _is_this_machine(host):
        raise ConfigError(f"--host {host} would let anyone ask", f"set a key that clients send: {KEY_ENV}=…")
    store = Store(settings.root)
    inputs = {name: require_current(store, steps[name], steps[needed[-1]]) for name in needed}
    identity = external_key.of_served_base(settings, digest_cache(settings))
    address = f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"
    with (
        serve.listener(host, port) as listener,
        TerminalProgress() as progress,
        serve.open_gateway(settings, inputs, identity, key, progress) as gateway,
    ):

        def say_where() -> None:
            progress.done()
            terminal.say(f"models fast, slow and auto at {address}; Ctrl-C ends it. For example:")
            header = f' -H "Authorization: Bearer ${KEY_ENV}"' if key else ""
            terminal.say(EXAMPLE.format(address=address, key=header))

        gateway.run(listener, say_where)


def _is_this_machine(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
