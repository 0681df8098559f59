"""Thoughts of rollouts that are closed at `rl.max_thinking_length`, so that an answer follows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from stages.prompts.renderer import Renderer

Generated = tuple[list[list[int]], list[Any] | None]
"""Token ids of completions, and their log-probabilities if the engine tells them."""


@dataclass(frozen=True)
class ThoughtLimit:
    """Closes the thoughts that are open after `thinking` of `longest` tokens, as the chat template does."""

    thinking: int
    longest: int
    renderer: Renderer

    def complete(
        self, prompts: list[list[int]], generate: Callable[[list[list[int]], int, str], Generated]
    ) -> Generated:
        """Completions of prompts in two rounds: the second goes on after the limit, from closed thoughts.

        generate: given prompts, a number of tokens and a suffix of the seed, returns completions of at most
        so many tokens. Tokens that close a thought have log-probability 0; `written` tells them.
        """
        ids, logprobs = generate(prompts, self.thinking, "")
        going_on = [i for i, tokens in enumerate(ids) if tokens[-1] not in self.renderer.stop_ids]
        for i in going_on:
            closing = self._closing(prompts[i], ids[i])
            ids[i] = ids[i] + closing
            if logprobs is not None:
                logprobs[i] = logprobs[i] + [0.0] * len(closing)
        beginnings = [prompts[i] + ids[i] for i in going_on]
        more, more_logprobs = generate(beginnings, self.longest - self.thinking, " after thoughts")
        for n, i in enumerate(going_on):
            ids[i] = (ids[i] + more[n])[: self.longest]
            if logprobs is not None and more_logprobs is not None:
                logprobs[i] = (logprobs[i] + more_logprobs[n])[: self.longest]
        return ids, logprobs

    def written(self, prompt: list[int], completion: list[int]) -> list[int]:
        """For each token of a completion 1 if the model wrote it, 0 if it closes a thought in its place."""
        closing = len(self._closing(prompt, completion[: self.thinking]))
        end = self.thinking + closing
        return [int(not self.thinking <= i < end) for i in range(len(completion))]

    def _closing(self, prompt: list[int], begun: list[int]) -> list[int]:
        return self.renderer.closing_ids(self.renderer.tokenizer.decode(prompt), begun)
