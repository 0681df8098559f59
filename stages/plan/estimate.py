"""Time and memory of each step before it runs, and the lengths of texts beside their limits."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass

from stages.config import Config
from stages.errors import is_out_of_memory
from stages.pipeline.steps import Step
from stages.plan.lengths import Span
from stages.runtime import libraries, resources

log = logging.getLogger(__name__)


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


def memory_remedies(config: Config, steps: list[Step], predicted: Estimate) -> dict[str, str]:
    """The names of those steps that do not fit into the memory → what to change so that they do."""
    remedies, room = {}, predicted.room or math.inf
    for step in steps:
        memory = predicted.costs[step.name].memory or MemoryEstimate()
        if memory.weights > room:
            remedies[step.name] = "set model.load_in_4bit, or choose a smaller model"
        elif memory.total > room:
            remedies[step.name] = f"lower {step.stage.memory_hint(config, step.variant)}"
    return remedies


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
        costs = {step.name: too_large if step.stage.holds_base(config) else Cost() for step in steps}
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
