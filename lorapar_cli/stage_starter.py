"""How `run` and `sweep` start a stage: as a fork of a process that has imported what the stages import."""

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
"""Not GRPOTrainer: whether that is to load vLLM, each run of RL decides."""


def starter() -> Starter:
    return Starter("lorapar_cli", MODULES)
