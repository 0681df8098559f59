"""Time and memory of each step before it runs, and the lengths of texts beside their limits."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from stages.config import Config
from stages.errors import is_out_of_memory
from stages.pipeline import launch
from stages.pipeline.stages import rescored_by_rollouts
from stages.pipeline.steps import Step
from stages.plan.lengths import Span
from stages.runtime import libraries, resources

log = logging.getLogger(__name__)

KNOBS = {
    "classify": "server.batch_size, or choose a smaller model",
    "score": "score.batch_size",
    "sft": "sft.per_device_train_batch_size, or set sft.gradient_checkpointing",
    "rl": "rl.per_device_train_batch_size, rl.rollouts.batch_size, or rl.max_completion_length, "
    "or set rl.gradient_checkpointing",
    "eval": "server.batch_size",
}
"""The settings that lower the memory of a stage."""
COLOCATED = "rl.rollouts.gpu_memory_utilization, or set rl.rollouts.enable_sleep_mode, or lower "
"""Stands before those of rl where vLLM samples on the same GPU."""


@dataclass(frozen=True)
class MemoryEstimate:
    """Peak memory by its use, in MiB (2²⁰ bytes): of the GPU, or without one of the process."""

    weights: float = 0.0
    """The base, the adapter, and a second copy of the base where a stage holds one."""
    optimizer: float = 0.0
    """Gradients of the adapter, Adam's moments, and the indices of the packed elements."""
    activations: float = 0.0
    """Activations and buffers of a forward and backward pass."""
    cache: float = 0.0
    """KV cache of sampling; with vLLM on the same GPU all memory that vLLM may take."""
    libraries: float = 0.0
    """Memory of the process before it loads a model."""

    @property
    def total(self) -> float:
        return self.weights + self.optimizer + self.activations + self.cache + self.libraries


@dataclass(frozen=True)
class Cost:
    """Cost of one step; None if it cannot be predicted: other machines or other people's code do the work."""

    seconds: float | None = None
    memory: MemoryEstimate | None = None

    @property
    def mib(self) -> float | None:
        return None if self.memory is None else self.memory.total


@dataclass(frozen=True)
class Estimate:
    """Costs by step name, and what is known of the machine."""

    costs: dict[str, Cost]
    spans: list[Span]
    room: int | None = None
    """Memory of the device, in MiB; None if nothing was measured."""
    busy_cores: float | None = None
    """Cores that other work keeps busy; None if it is no more than on an idle system."""

    @property
    def seconds(self) -> list[float]:
        """Seconds of the steps whose time can be predicted."""
        return [cost.seconds for cost in self.costs.values() if cost.seconds is not None]

    @property
    def too_large(self) -> list[str]:
        """Names of the steps that do not fit into the memory."""
        room = self.room
        return [name for name, cost in self.costs.items() if room and cost.mib and cost.mib > room]


def remedy(step: str, config: Config, predicted: Estimate) -> str:
    """Return what to change so that a step that does not fit into the memory does."""
    memory = predicted.costs[step].memory
    if memory and predicted.room and memory.weights > predicted.room:
        return "set model.load_in_4bit, or choose a smaller model"
    return f"lower {knobs(step, config)}"


def knobs(step: str, config: Config) -> str:
    """The settings to lower so that a step fits."""
    stage = step.partition(":")[0]
    if step == "score:rl" and rescored_by_rollouts(config):
        stage = "rl"
    colocated = stage == "rl" and config.rl.rollouts.engine == "vllm_colocate"
    return (COLOCATED if colocated else "") + KNOBS[stage]


def _holds_base(step: Step, config: Config) -> bool:
    """Whether a process of this step holds all weights of the base, and not a server or several processes."""
    stage = step.stage.name
    if stage == "eval":
        return config.eval.engine == "transformers"
    return stage in ("score", "sft", "rl") and launch.gpu_split(getattr(config, stage).launch)[1] == 1


def estimate(config: Config, steps: list[Step]) -> Estimate:
    """Predict the cost of these steps from some seconds of measuring the model."""
    with libraries.hide_packages(*libraries.UNUSED):  # as in the stages: they take seconds, and memory
        from stages.models.base import weights_mib
        from stages.plan.cost_model import CostModel
        from stages.plan.profiler import Profiler, one_thread
        from stages.plan.prompt_lengths import Texts, spans

    texts = Texts(config)
    unknown = {step.name: Cost() for step in steps}
    if not any(texts.rows[name] for name in ("train", *config.eval.benchmarks)):
        return Estimate(unknown, [])
    lengths = list(spans(texts, steps))
    room = resources.total_memory()
    # Loading what cannot fit would end this process on a CPU, where memory is promised before it is there.
    if not config.model.load_in_4bit and (weights := weights_mib(config.model)) > room:
        too_large = Cost(memory=MemoryEstimate(weights=weights))
        costs = {step.name: too_large if _holds_base(step, config) else Cost() for step in steps}
        return Estimate(costs, lengths, room)
    with one_thread() as threads:
        try:
            profiler = Profiler(config, texts.tokenizer, threads)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            log.warning("the base does not fit on this device, so nothing could be measured")
            return Estimate(unknown, lengths)
        model = CostModel(config, texts, profiler)
        costs = {step.name: model.cost(step) for step in steps}
    return Estimate(costs, lengths, profiler.room, profiler.busy_cores())
