"""Starts the stages of `run` and `sweep` as forks of a process that has imported their libraries already."""

from stages.pipeline.stages import STAGES
from stages.runtime.fork_server import Starter

MODULES = (
    "lorapar_cli.app",
    *(f"stages.{name}" for name in STAGES),
    "stages.engines.in_process",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "datasets",
    "matplotlib.figure",
    "trl.trainer.sft_trainer",
)
"""Imported before the fork. Not GRPOTrainer: each RL run decides whether that imports vLLM."""


def starter() -> Starter:
    return Starter("lorapar_cli", MODULES)
