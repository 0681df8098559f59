"""The in-process sampler of rollouts: from a merged copy of the model in training where there is one."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING

from stages.engines.continuous_batching import generate
from stages.lora.adapter import fsdp, sparse_linear

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase

    from stages.engines import Sampling
    from stages.lora.adapter.merge import MergedCopy


@dataclass(frozen=True)
class RolloutSampler:
    """Samples from the model in training as it is at that moment."""

    adapted: PeftModel
    copy: MergedCopy | None
    """None: through the adapter's own layers, which is slower on a CPU."""
    tokenizer: PreTrainedTokenizerBase
    sampling: Sampling

    def sample(self, prompts: list[list[int]], seed: str) -> list[list[int]]:
        """The token ids of one completion for each prompt; the same seed gives the same ones."""
        generator = random.Random(seed)
        seeds = [generator.getrandbits(62) for _ in prompts]
        with fsdp.unsharded(self.adapted), sparse_linear.frozen_weights(self.adapted):
            model = self.adapted if self.copy is None else self.copy.refresh(self.adapted)
            completions = dict(generate(model, self.tokenizer, prompts, self.sampling, (), seeds))
        return [completions[i].ids for i in range(len(prompts))]
