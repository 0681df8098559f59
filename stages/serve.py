"""Serve both modes of a trained model by one vLLM server, and `auto`, which chooses between them."""

from __future__ import annotations

import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from stages.config import Config
from stages.engines import ChoiceResult, Engine
from stages.engines.gateway import Gateway
from stages.errors import ConfigError, ServerError
from stages.labelling.router import Router
from stages.models.dtype import answer_dtype
from stages.progress import Progress
from stages.records import Example, read_labels
from stages.report.views import prompt_of, views_of
from stages.store.artifacts import Artifact

if TYPE_CHECKING:
    from collections.abc import Mapping

VOTER = "router"
"""Name of the adapter of zeros that the votes are asked of.

Its model is the base. On CPU, vLLM 0.31 applies an adapter also to requests for the base that are batched
with requests for the adapter (its pull request 48421), but it keeps two adapters apart.
"""


@contextmanager
def listener(host: str, port: int) -> Iterator[socket.socket]:
    """Bind the address before the server starts, which takes a while; ServerError if that is not possible."""
    try:
        bound = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise ServerError(
            f"--host {host} --port {port}: {error.strerror or error}", "another port: --port N"
        ) from None
    with bound:
        yield bound


@contextmanager
def open_gateway(
    config: Config, inputs: Mapping[str, Artifact], identity: str, api_key: str, progress: Progress
) -> Iterator[Gateway]:
    """Start the server with both adapters, find the router's threshold, and yield the gateway before it.

    inputs: the artifacts of classify:train and of both modes, by step. identity: of the base, for the journal
    of votes. api_key: which clients have to send; empty for none. ConfigError for a model that vLLM cannot
    serve so.
    """
    from stages.engines import vllm

    _check(config)
    labels = read_labels(inputs["classify:train"].path / "labels.jsonl")
    identity = f"{identity} {answer_dtype(config.model, 'vllm')}"
    router = Router(config.classify, config.model, "vllm", identity, labels, Path(config.runs_dir))
    router.set_questions([])
    with tempfile.TemporaryDirectory(prefix="lorapar-router-") as folder:
        zeros = Path(folder)
        adapters = {mode: inputs[view.step].adapter for mode, view in views_of(config).items()}
        _write_zeros(adapters["fast"], zeros)
        modules = adapters | {VOTER: zeros}
        with vllm.open_modules(config.model, modules, config.server, progress.say) as clients:
            voter = clients[VOTER]
            router.collect(lambda: voter, progress)
            router.journal.check(config.classify.max_failed, config.classify.max_invalid)
            router.calibrate()
            progress.say(router.summary())
            yield Gateway(
                voter.transport.urls[0].removesuffix("/v1"),
                {mode: _system_message(config, mode) for mode in adapters},
                lambda example: _decide(router, voter, example),
                voter.transport.exit_error,
                api_key,
            )


def _check(config: Config) -> None:
    if not config.served_by_vllm:
        cause = f"baseline {config.baseline.method}" if config.baseline else "adapters of a 4-bit base"
        raise ConfigError(f"vLLM cannot serve {cause}")
    for view in views_of(config).values():
        template = prompt_of(config, view).template
        if template != "chat":
            hint = "lorapar export CONFIG DIR --views says how to serve it"
            raise ConfigError(
                f"a server takes chats, and {view.target} learned prompts of template {template}", hint
            )


def _system_message(config: Config, mode: str) -> str | None:
    """The system message with which a mode was trained."""
    view = views_of(config)[mode]
    section = prompt_of(config, view)
    return section.by_system.get(int(view.system), section.system)


def _decide(router: Router, voter: Engine, example: Example) -> tuple[str, float | None]:
    """The mode of a question, and the probability of System 2 that its vote gave, if it gave one."""
    [(_, result)] = voter.choose_words([router.request(example)])
    system2 = result.probabilities[1] if isinstance(result, ChoiceResult) and result.probabilities else None
    return router.mode(system2), system2


def _write_zeros(adapter: Path, out: Path) -> None:
    """Write an adapter of the same shape whose product is zero: its model is the base."""
    from safetensors.torch import load_file, save_file

    shutil.copy(adapter / "adapter_config.json", out)
    weights = load_file(adapter / "adapter_model.safetensors")
    save_file(
        {name: weight.zero_() if "lora_B" in name else weight for name, weight in weights.items()},
        out / "adapter_model.safetensors",
        metadata={"format": "pt"},
    )
