"""Rollouts that the trainer samples itself: from a merged copy of its model where there is one."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from stages.engines.continuous_batching import SLOTS, generate
from stages.lora.adapter import fsdp, sparse_linear
from stages.packing.support import eval_mode
from stages.runtime import distributed

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase

    from stages.engines import Sampling
    from stages.lora.adapter.merge import MergedCopy
    from stages.lora.grpo.prompts import RlPrompts


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
        draw = random.Random(seed)
        seeds = [draw.getrandbits(62) for _ in prompts]
        with fsdp.unsharded(self.adapted), sparse_linear.frozen_weights(self.adapted):
            model = self.adapted if self.copy is None else self.copy.refresh(self.adapted)
            made = dict(generate(model, self.tokenizer, prompts, self.sampling, (), seeds))
        return [made[i].ids for i in range(len(prompts))]


class Written:
    """Mixin for GRPOTrainer, to stand before it: prompts come with their tokens, and `writer` completes them.

    Set `pool` and `writer` before `train`. A writer without a copy leaves completions to TRL: by vLLM, or by
    generating through the adapter, of which nothing drops out then.
    """

    pool: RlPrompts
    writer: RolloutSampler
    attempt: int
    args: Any
    state: Any

    def _tokenize_prompts(self, prompts: list[str]) -> Any:
        # TRL would have the tokenizer add its special tokens to a rendered chat a second time.
        return [self.pool.tokens[prompt] for prompt in prompts], None, {}

    def _generate_single_turn(self, prompt_ids: Any, *args: Any, **given: Any) -> Any:
        if self.writer.copy is None:
            write = super()._generate_single_turn  # type: ignore[misc]
            with sparse_linear.frozen_weights(self.writer.adapted), eval_mode(self.writer.adapted):
                if self.args.use_vllm or len(prompt_ids) <= SLOTS:  # vLLM has a scheduler of its own
                    return write(prompt_ids, *args, **given)
                # TRL would have all samples of a step in memory at once.
                every = range(0, len(prompt_ids), SLOTS)
                parts = [write(prompt_ids[at : at + SLOTS], *args, **given) for at in every]
            return [ids for made, *_ in parts for ids in made], *parts[0][1:]
        again = f" {self.attempt}" if self.attempt else ""
        seed = f"{self.args.seed} rollouts {self.state.global_step} {distributed.rank()}{again}"
        return self.writer.sample(prompt_ids, seed), None
