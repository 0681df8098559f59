"""The in-process sampler of rollouts: from a merged copy of the model in training where there is one.

Each completion is drawn by a seed of its own, so it does not depend on how many are sampled at a time.
"""

from __future__ import annotations

import random
from contextlib import nullcontext
from dataclasses import dataclass, replace

from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from stages.engines import Completion, Sampling
from stages.engines.continuous_batching import generate
from stages.lora.adapter.elements import frozen_weights
from stages.lora.adapter.merge import MergedCopy
from stages.lora.grpo.int8 import linear_layers_in_int8
from stages.packing.support import eval_mode
from stages.runtime.batch_size import BatchSize


@dataclass(frozen=True)
class RolloutSampler:
    """Samples from the model in training as it is at that moment."""

    adapted: PeftModel
    copy: MergedCopy | None
    """None: through the adapter's own layers, which is slower on a CPU."""
    tokenizer: PreTrainedTokenizerBase
    sampling: Sampling
    size: BatchSize
    """How many completions are sampled at a time."""
    in_int8: bool = False
    """Whether the copy computes in 8 bits; see `int8.py`."""

    def sample(self, prompts: list[list[int]], seed: str, longest: int | None = None) -> list[Completion]:
        """One completion for each prompt; the same seed gives the same ones.

        longest: most tokens of a completion, if not `sampling.max_new_tokens`.

        If memory runs out, what is not yet sampled is sampled in smaller batches, now and from now on.
        """
        generator = random.Random(seed)
        seeds = [generator.getrandbits(62) for _ in prompts]
        sampling = replace(self.sampling, max_new_tokens=longest or self.sampling.max_new_tokens)
        completions: dict[int, Completion] = {}

        def complete(items: list[int], slots: int) -> None:
            chosen, chosen_seeds = [prompts[i] for i in items], [seeds[i] for i in items]
            for n, completion in generate(model, self.tokenizer, chosen, sampling, (), chosen_seeds, slots):
                completions[items[n]] = completion

        with eval_mode(self.adapted), frozen_weights(self.adapted):
            model = self.adapted if self.copy is None else self.copy.refresh(self.adapted)
            with linear_layers_in_int8(model, prompts[0]) if self.in_int8 else nullcontext():
                while remaining := [i for i in range(len(prompts)) if i not in completions]:
                    slots = min(self.size.now, len(remaining))
                    self.size.attempt(slots, complete, remaining, slots)
        return [completions[i] for i in range(len(prompts))]
