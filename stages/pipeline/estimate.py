"""What each step will cost on this machine, in time and in memory: work is counted, its pieces are measured.

What nobody can know before is assumed: half of the rows are System 1, a trained model answers as long as the
references are and an untrained one as long as it may, vLLM writes no faster than this process would, all
steps of a stage are made by one command, which starts once, and several GPUs each do their share in its time.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass

from stages.config import Config
from stages.errors import lacks_memory
from stages.pipeline.cost import Cost
from stages.pipeline.lengths import Span
from stages.pipeline.plan import Step
from stages.pipeline.work import Work

log = logging.getLogger(__name__)

LAST = {"score": 1, "sft": 2, "rl": 3}
"""Stages whose work is measured after that of all others, in this order."""

KNOBS = {
    "classify": "server.batch_size, or choose a smaller model",
    "score": "score.batch_size",
    "sft": "sft.micro_batch, or set sft.gradient_checkpointing",
    "rl": "rl.micro_batch, or rl.max_completion, or set rl.gradient_checkpointing",
    "eval": "server.batch_size",
}
"""The settings that lower the memory of a stage."""
COLOCATED = "rl.rollouts.gpu_memory, or set rl.rollouts.sleep, or lower "
"""Before those of rl, where vLLM samples on the same GPU."""


def knobs(step: str, config: Config) -> str:
    """What to lower so that a step fits."""
    stage = step.partition(":")[0]
    colocated = stage == "rl" and config.rl.rollouts.engine == "vllm_colocate"
    return (COLOCATED if colocated else "") + KNOBS[stage]


@dataclass(frozen=True)
class Estimate:
    """What is to be told before a run."""

    costs: dict[str, Cost]
    spans: list[Span]
    room: int | None = None
    """Memory of the device, in MiB; None if nothing was measured."""


def estimate(config: Config, steps: list[Step]) -> Estimate:
    """The cost of these steps, from some seconds of measuring on the model."""
    begun = time.perf_counter()
    work = Work(config, steps)
    if not any(work.rows.values()):
        return Estimate({step.name: Cost(None, None) for step in steps}, [])
    from stages.pipeline.probe import Probe

    try:
        work.probe = Probe(config, work.tokenizer, bool(work.stages & {"sft", "rl"}))
    except Exception as error:
        if not lacks_memory(error):
            raise
        log.warning("the base does not fit on this device, so nothing could be measured")
        return Estimate({step.name: Cost(None, None) for step in steps}, work.spans())
    measured = work.probe.loading.seconds + work.probe.trainer.seconds
    work.starting = time.perf_counter() - begun - measured
    # What training leaves in memory would count for what is measured after it.
    found = {
        step.name: work.cost(step) for step in sorted(steps, key=lambda step: LAST.get(step.stage.name, 0))
    }
    return Estimate({step.name: found[step.name] for step in steps}, work.spans(), work.probe.room)
