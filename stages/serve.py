"""Serve both modes of a trained model by one vLLM server, and `auto`, which chooses between them."""

from __future__ import annotations

import asyncio
import shutil
import socket
import tempfile
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from stages.config import MODES, SYSTEMS, TRAINED, Config
from stages.engines.gateway import Gateway, ModePrompt, Post
from stages.errors import ConfigError, ServerError
from stages.evaluation.routing import read_tuning, tuning_steps
from stages.labelling.router import Router, build_router
from stages.labelling.votes import VoteJournal
from stages.models.dtype import answer_dtype
from stages.progress import Progress
from stages.records import Example, read_labels
from stages.store.artifacts import Artifact

if TYPE_CHECKING:
    from collections.abc import Mapping

    from stages.engines.openai import Client

PROBE = Example("probe", "What is 3 + 4?", "", None)
"""A question to ask before the first client does."""
VOTER = "router"
"""Name of the adapter of zeros that the votes are asked of.

Its model is the base. On CPU, vLLM 0.31 applies an adapter also to requests for the base that are batched
with requests for the adapter (its pull request 48421), but it keeps two adapters apart.
"""


@contextmanager
def listener(host: str, port: int) -> Iterator[socket.socket]:
    """Bind the address before the server starts, which takes a while; ServerError if that is not possible.

    The socket does not listen yet, so that clients are refused until there is somebody to answer.
    """
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as bound:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # connections inherit it
        try:
            bound.bind((host, port))
        except OSError as error:
            raise ServerError(
                f"--host {host} --port {port}: {error.strerror or error}", "another port: --port N"
            ) from None
        yield bound


@contextmanager
def open_gateway(
    config: Config,
    inputs: Mapping[str, Artifact],
    identity: str,
    api_key: str,
    progress: Progress,
) -> Iterator[Gateway]:
    """Start the server with both adapters, find the router's threshold, and yield the gateway before it.

    inputs: the artifacts of classify:train and of both modes, by step. identity: of the base, for the journal
    of votes. api_key: which clients have to send; empty for none.
    ConfigError for a model that vLLM cannot serve so.
    """
    from stages.engines import vllm

    _check(config)
    modes = config.eval.modes
    identity = f"{identity} {answer_dtype(config.model, 'vllm')}"
    fast = modes[MODES[0]]
    identities = {"vote": identity, "choice": f"{identity} {inputs[TRAINED[fast]].digest}"}
    labels = read_labels(inputs["classify:train"].path / "labels.jsonl")
    router = build_router(
        config.eval.router, config.classify, config.model, config.prompt_of(fast), "vllm", identities,
        labels, Path(config.runs_dir),
    )  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="lorapar-router-") as folder:
        zeros = Path(folder)
        adapters = {mode: inputs[TRAINED[target]].adapter for mode, target in modes.items()}
        _write_zeros(adapters[MODES[0]], zeros)
        modules = adapters | {VOTER: zeros}
        with vllm.open_modules(config.model, modules, config.server, progress.say) as clients:
            voter = clients[VOTER]
            voters = {"vote": voter, "choice": clients[MODES[0]]}
            for signal, journal in router.journals.items():
                # From the first reply a client learns how many tokens tell the words apart.
                deque(voters[signal].choose_words([journal.question(PROBE)]), maxlen=0)
            _set_threshold(router, config, inputs, voters, progress)
            progress.say(router.summary())
            yield Gateway(
                voter.urls[0].removesuffix("/v1"),
                {mode: _mode_prompt(config, mode) for mode in adapters},
                partial(_votes, router, voters),
                router.mode,
                voter.exit_error,
                api_key,
                voter.key,
            )


def _set_threshold(
    router: Router,
    config: Config,
    inputs: Mapping[str, Artifact],
    voters: Mapping[str, Client],
    progress: Progress,
) -> None:
    """Find the threshold on rows that are asked now."""
    tuning = read_tuning(config.eval, inputs)
    router.set_questions(tuning.items if tuning else [])
    router.collect(voters.__getitem__, progress, "choices", config.classify)
    router.find_threshold(tuning)


def _check(config: Config) -> None:
    if not config.served_by_vllm:
        cause = f"baseline {config.baseline.method}" if config.baseline else "adapters of a 4-bit base"
        raise ConfigError(f"vLLM cannot serve {cause}")
    for target in config.eval.modes.values():
        template = config.prompt_of(target).template
        if template != "chat":
            hint = "lorapar export CONFIG DIR --views says how to serve it"
            raise ConfigError(
                f"a server takes chats, and {target} learned prompts of template {template}", hint
            )


def _mode_prompt(config: Config, mode: str) -> ModePrompt:
    """The prompt with which a mode was trained."""
    target = config.eval.modes[mode]
    section, system = config.prompt_of(target), SYSTEMS[target]
    return ModePrompt(section.system_message(system), section.template_arguments(system))


def needed_steps(config: Config) -> tuple[str, ...]:
    """The steps whose artifacts are served, or tell how to choose between them."""
    trained = (TRAINED[target] for target in config.eval.modes.values())
    return ("classify:train", *tuning_steps(config.eval), *trained)


async def _votes(router: Router, clients: Mapping[str, Client], example: Example, post: Post) -> list[float]:
    """The router's signals on a question that the server is asked for; ValueError if a reply has none."""

    async def ask(signal: str, journal: VoteJournal) -> float:
        path, body, read = clients[signal].prepared_choice(journal.question(example))
        if (probabilities := read(await post(path, body))) is None:
            raise ValueError("the reply does not tell the words apart")
        return probabilities[1]

    return await asyncio.gather(*(ask(*item) for item in router.journals.items()))


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
