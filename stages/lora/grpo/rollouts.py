"""Rollouts: the sampler in the trainer's process, and the limit of thoughts, which vLLM's have as well.

The sampler draws from a merged copy of the model in training where there is one, and each completion by a
seed of its own, so that none depends on how many are sampled at a time.
"""

import random
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

from peft import PeftModel

from stages.engines import Completion, Sampling
from stages.engines.continuous_batching import generate
from stages.errors import ConfigError
from stages.lora.adapter.elements import frozen_weights
from stages.lora.adapter.merge import MergedCopy
from stages.lora.grpo.int8 import linear_layers_in_int8
from stages.packing.support import eval_mode
from stages.prompts.chat_template import check_thought_limit
from stages.prompts.renderer import Renderer
from stages.runtime.resources import BatchSize

Generated = tuple[list[list[int]], list[Any] | None]
"""Token ids of completions, and their log-probabilities if the engine tells them."""


@dataclass(frozen=True)
class RolloutSampler:
    """Samples from the model in training as it is at that moment."""

    adapted: PeftModel
    copy: MergedCopy | None
    """None: through the adapter's own layers, which is slower on a CPU."""
    renderer: Renderer
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
        tokenizer = self.renderer.tokenizer

        def complete(items: list[int], slots: int) -> None:
            chosen, chosen_seeds = [prompts[i] for i in items], [seeds[i] for i in items]
            for n, completion in generate(model, tokenizer, chosen, sampling, (), chosen_seeds, slots):
                completions[items[n]] = completion

        with eval_mode(self.adapted), frozen_weights(self.adapted):
            model = self.adapted if self.copy is None else self.copy.refresh(self.adapted)
            with linear_layers_in_int8(model, prompts[0]) if self.in_int8 else nullcontext():
                while remaining := [i for i in range(len(prompts)) if i not in completions]:
                    slots = min(self.size.now, len(remaining))
                    self.size.attempt(slots, complete, remaining, slots)
        return [completions[i] for i in range(len(prompts))]


@dataclass(frozen=True)
class ThoughtLimit:
    """Closes thoughts that are open after `max_thought` of `max_completion` tokens, as the template does."""

    max_thought: int
    max_completion: int
    renderer: Renderer

    def __post_init__(self) -> None:
        check_thought_limit(self.renderer.tokenizer, self.renderer.marks, "rl.max_thinking_length")
        closing = len(self.renderer.closing)
        if self.max_thought + closing >= self.max_completion:
            raise ConfigError(
                f"rl.max_thinking_length {self.max_thought}, with the {closing} tokens that close a thought, "
                f"leaves no room for an answer within rl.max_completion_length {self.max_completion}",
                "raise rl.max_completion_length",
            )

    def complete(
        self, prompts: list[list[int]], generate: Callable[[list[list[int]], int, str], Generated]
    ) -> Generated:
        """Complete prompts up to the limit, then those that are not finished, from closed thoughts.

        generate: given prompts, a number of tokens and a suffix of the seed, returns completions of at most
        so many tokens. Tokens that close a thought have log-probability 0; `written` tells them.
        """
        ids, logprobs = generate(prompts, self.max_thought, "")
        # vLLM ends completions at stop tokens of the model's generation_config.json, too: these are shorter.
        stops, most = self.renderer.stop_ids, self.max_thought
        unfinished = [i for i, row in enumerate(ids) if len(row) == most and row[-1] not in stops]
        for i in unfinished:
            closing = self.renderer.closing_ids(self.renderer.tokenizer.decode(prompts[i]), ids[i])
            ids[i] = ids[i] + closing
            if logprobs is not None:
                logprobs[i] = logprobs[i] + [0.0] * len(closing)
        # Completions of one length have the same room left; there are two lengths, with and without tags.
        for length, group in groupby(sorted(unfinished, key=lambda i: len(ids[i])), lambda i: len(ids[i])):
            members, room = list(group), self.max_completion - length
            beginnings = [prompts[i] + ids[i] for i in members]
            continuations, more_logprobs = generate(beginnings, room, f" after {length}")
            for n, i in enumerate(members):
                ids[i] = ids[i] + continuations[n]
                if logprobs is not None and more_logprobs is not None:
                    logprobs[i] = logprobs[i] + more_logprobs[n]
        return ids, logprobs

    def written(self, prompt: list[int], completion: list[int]) -> list[int]:
        """For each token of a completion 1 if the model wrote it, 0 if it closes a thought in its place."""
        text = self.renderer.tokenizer.decode(prompt)
        span = self.renderer.closing_span(text, completion, self.max_thought)
        return [int(i not in span) for i in range(len(completion))]
