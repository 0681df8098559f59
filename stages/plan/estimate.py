"""What each step will cost, in time and in memory, and the lengths of texts beside their limits."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from stages.config import Config
from stages.errors import lacks_memory
from stages.pipeline.steps import Step
from stages.plan.cost import Cost
from stages.plan.lengths import Span

log = logging.getLogger(__name__)

KNOBS = {
    "classify": "server.batch_size, or choose a smaller model",
    "score": "score.batch_size",
    "sft": "sft.per_device_train_batch_size, or set sft.gradient_checkpointing",
    "rl": "rl.per_device_train_batch_size, or rl.max_completion_length, or set rl.gradient_checkpointing",
    "eval": "server.batch_size",
}
"""The settings that lower the memory of a stage."""
COLOCATED = "rl.rollouts.gpu_memory_utilization, or set rl.rollouts.enable_sleep_mode, or lower "
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
    busy_cores: float | None = None
    """Cores that other work keeps busy; None if that is no more than a system at rest does."""

    @property
    def seconds(self) -> list[float]:
        """Of the steps whose time is known."""
        return [cost.seconds for cost in self.costs.values() if cost.seconds is not None]

    @property
    def too_large(self) -> list[str]:
        """The steps that do not fit into the memory."""
        room = self.room
        return [name for name, cost in self.costs.items() if room and cost.mib and cost.mib > room]


def estimate(config: Config, steps: list[Step]) -> Estimate:
    """The cost of these steps, from some seconds of measuring on the model."""
    from stages.plan import prompt_lengths
    from stages.plan.cost_model import CostModel
    from stages.plan.profiler import Profiler, one_thread

    model = CostModel(config, steps)
    if not any(model.rows.values()):
        return Estimate({step.name: Cost() for step in steps}, [])
    spans = list(prompt_lengths.spans(model))
    with one_thread() as threads:
        try:
            model.profiler = Profiler(config, model.tokenizer)
        except Exception as error:
            if not lacks_memory(error):
                raise
            log.warning("the base does not fit on this device, so nothing could be measured")
            return Estimate({step.name: Cost() for step in steps}, spans)
        work = {step.name: model.work(step) for step in steps}
        busy_cores, speedup = model.profiler.busy_cores(), model.profiler.speedup(threads)
    costs = {step.name: model.cost(step, work[step.name], speedup) for step in steps}
    return Estimate(costs, spans, model.profiler.room, busy_cores)
