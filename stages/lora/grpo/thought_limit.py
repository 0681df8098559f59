"""Closes the thoughts of rollouts at `rl.max_thinking_length`, so that an answer follows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from stages.prompts.renderer import Renderer

Generated = tuple[list[list[int]], list[Any] | None]
"""Token ids of completions, and their log-probabilities if the engine tells them."""


@dataclass(frozen=True)
class ThoughtLimit:
    """Closes thoughts that are open after `max_thought` of `max_completion` tokens, as the template does."""

    max_thought: int
    max_completion: int
    renderer: Renderer

    def complete(
        self, prompts: list[list[int]], generate: Callable[[list[list[int]], int, str], Generated]
    ) -> Generated:
        """Complete prompts up to the limit, then those that are not finished, from closed thoughts.

        generate: given prompts, a number of tokens and a suffix of the seed, returns completions of at most
        so many tokens. Tokens that close a thought have log-probability 0; `written` tells them.
        """
        ids, logprobs = generate(prompts, self.max_thought, "")
        unfinished = [i for i, tokens in enumerate(ids) if self._is_unfinished(tokens)]
        for i in unfinished:
            closing = self.renderer.closing_ids(self.renderer.tokenizer.decode(prompts[i]), ids[i])
            ids[i] = ids[i] + closing
            if logprobs is not None:
                logprobs[i] = logprobs[i] + [0.0] * len(closing)
        # Completions of one length have the same room left; there are two lengths, with and without tags.
        for length, group in groupby(sorted(unfinished, key=lambda i: len(ids[i])), lambda i: len(ids[i])):
            if (room := self.max_completion - length) <= 0:
                continue  # the thought has left no room for an answer
            members = list(group)
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

    def _is_unfinished(self, tokens: list[int]) -> bool:
        # vLLM ends completions at stop tokens of the model's generation_config.json, too: these are shorter.
        return len(tokens) == self.max_thought and tokens[-1] not in self.renderer.stop_ids
