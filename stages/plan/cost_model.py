"""Predicts time and memory of each step: its number of tokens, times what a token costs in a measured batch.

Before a run nobody knows how the rows will be labelled or how long answers get. The model assumes that half
of the rows are System 1; that a trained model's answers are as long as the references, and an untrained one's
run to the limit; that vLLM generates no faster than this process would; and that n GPUs take 1/n of one's
time. Each stage counts its own work; here is what they have in common.
"""

from __future__ import annotations

from stages.config import Config, LaunchSection
from stages.engines.continuous_batching import FREE_SHARE
from stages.errors import is_out_of_memory
from stages.pipeline import launch
from stages.pipeline.steps import Step
from stages.plan.estimate import Cost, MemoryEstimate
from stages.plan.profiler import Measurement, Profiler
from stages.plan.prompt_lengths import Texts
from stages.runtime.resources import MIB

SERVER_S = 40.0
"""Seconds to start a vLLM server: 37 to 51 for 135 million parameters on two cores, more for more."""
SYSTEM1_SHARE = 0.5
"""Share of System 1 among the rows."""
ADAM_BYTES = 16
"""Bytes of a trained element of the adapter: gradient, Adam's two moments, index among the packed ones."""
NOTHING, UNKNOWN = Cost(0.0), Cost()


class CostModel:
    """Predicts the steps of a run from the texts that they read and a profile of the model."""

    def __init__(self, config: Config, texts: Texts, profiler: Profiler) -> None:
        self.config, self.texts, self.profiler = config, texts, profiler
        self._generation: dict[bool, tuple[Measurement, Measurement]] = {}

    def cost(self, step: Step) -> Cost:
        try:
            return step.stage.cost(self, step.variant) if step.stage.cost else UNKNOWN
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            # Not even the small batch that is measured fits.
            return Cost(memory=MemoryEstimate(activations=self.profiler.room + 1))

    def response_tokens(self, limit: int) -> float:
        """Mean length of a trained model's answers: as the responses or, if no row has one, the limit."""
        return self.texts.responses.within(limit) if self.texts.imitable else float(limit)

    def generation(self, in_int8: bool = False) -> tuple[Measurement, Measurement]:
        """Prefill and decoding, see `Profiler.measure_generation`."""
        if in_int8 not in self._generation:
            measured = self.profiler.measure_generation(self.texts.typical_prompt, in_int8)
            self._generation[in_int8] = measured
        return self._generation[in_int8]

    def generation_s(self, answers: int, read_tokens: float, response: float, in_int8: bool = False) -> float:
        """answers · (read_tokens · prefill token_s + response · (1 + FREE) · decode token_s)

        Slots of answers that have ended are computed, too, until a share of FREE has ended.
        """
        prefill, decode = self.generation(in_int8)
        return answers * (read_tokens * prefill.token_s + response * (1 + FREE_SHARE) * decode.token_s)

    def total(
        self, thread_s: float, memory: MemoryEstimate | None, launched: LaunchSection | None = None,
        starts: float = 0.0, loads: int = 1,
    ) -> Cost:  # fmt: skip
        """thread_s: computation by one thread or one GPU. loads: of the model. starts: seconds of servers."""
        gpus = launch.gpu_split(launched)[0] if launched else 1
        seconds = thread_s / self.profiler.speedup / gpus + loads * self.profiler.loading_s + starts
        return Cost(seconds, memory)

    def memory(
        self, activations: float, adapted: bool = False, trained: bool = False, copy: float = 0.0,
        cache: float = 0.0, launched: LaunchSection | None = None,
    ) -> MemoryEstimate:  # fmt: skip
        """copy: MiB of a second model. trained: the adapter, by Adam. launched: it may divide the layers."""
        profiler = self.profiler
        elements = profiler.adapter_elements if adapted or trained else 0
        divided = profiler.layers_mib * (1 - launch.gpu_split(launched)[1]) if launched else 0.0
        return MemoryEstimate(
            weights=profiler.weights_mib - divided + elements * 4 / MIB + copy,
            optimizer=elements * ADAM_BYTES / MIB * trained,
            activations=activations,
            cache=cache,
            libraries=profiler.libraries_mib,
        )
