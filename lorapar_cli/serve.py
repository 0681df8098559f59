"""`lorapar serve`: both modes of a trained model behind one OpenAI-compatible address."""

import asyncio
import importlib.util
import os
from typing import Annotated

from lorapar_cli import terminal
from lorapar_cli.options import ConfigPath, Overrides, plan_of, trained, value
from stages.config import MODES
from stages.errors import ConfigError
from stages.pipeline.resolve import INSTALL_VLLM

EXAMPLE = """\
curl -i {address}/chat/completions{key} -H 'Content-Type: application/json' \\
  -d '{{"model": "slow", "messages": [{{"role": "user", "content": "What is 3 + 4?"}}]}}'"""
KEY_ENV = "VLLM_API_KEY"
Host = Annotated[str, value(f"Address to listen on; to let other machines in, set a key in {KEY_ENV}.")]
Port = Annotated[int, value("Port to listen on.", min=1, max=65535)]


def command(config: ConfigPath, host: Host = "127.0.0.1", port: Port = 8000, set_: Overrides = None) -> None:
    settings, steps, store = plan_of(config, set_)
    if not importlib.util.find_spec("vllm"):
        raise ConfigError("lorapar serve needs vLLM, which is not installed", INSTALL_VLLM)
    from stages import serve
    from stages.engines import vllm

    modes = serve.modes_of(settings)
    key = os.environ.get(KEY_ENV, "")
    if not key and host not in ("localhost", "127.0.0.1", "::1"):
        raise ConfigError(f"--host {host} would let anyone ask", f"set a key that clients send: {KEY_ENV}=…")
    artifacts = trained(store, steps, list(MODES.values()))
    adapters = {mode: artifacts[target].adapter for mode, target in MODES.items()}
    address = f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"
    with (
        serve.bind(host, port) as bound,
        terminal.TerminalProgress() as progress,
        vllm.open_modules(settings.model, adapters, settings.server, progress.say) as clients,
    ):
        client = clients[next(iter(modes))]

        def ready() -> None:
            progress.done()
            terminal.say(f"models fast and slow at {address}; Ctrl-C ends it. For example:")
            header = f' -H "Authorization: Bearer ${KEY_ENV}"' if key else ""
            terminal.say(EXAMPLE.format(address=address, key=header))

        app = serve.application(client.url, client.key, modes, key)
        asyncio.run(serve.run(app, bound, client.exit_error, ready))
