"""Which of several words a reply chooses, by its text or by the probabilities of its tokens."""

from __future__ import annotations

import math
import re

from stages.engines.openai.replies import LogProbs, ReplyChoice, rounding
from stages.engines.openai.requests import ALTERNATIVES
from stages.prompts.thoughts import after_thought


def parse_word(text: str, words: tuple[str, ...]) -> int | None:
    """Return the index of the word that a reply gives, or None if it gives no word or different ones.

    Reading is strict: the first or last line after the thinking must be the word and nothing else. Case,
    spaces, punctuation, markup and a leading "the answer is" are ignored.
    """
    lines = [line for line in after_thought(text).splitlines() if line.strip()]
    plain = [_plain(word) for word in words]
    indices = {plain.index(bare) for line in {*lines[:1], *lines[-1:]} if (bare := _plain(line)) in plain}
    return indices.pop() if len(indices) == 1 else None


def _plain(text: str) -> str:
    """Reduce a line to its letters and digits in lower case, without a leading "the answer is"."""
    words = " ".join(re.findall(r"[^\W_]+", text.casefold()))
    return re.sub(r"^(?:the )?(?:final )?answer (?:is )?", "", words).replace(" ", "")


def choice_probabilities(choice: ReplyChoice, words: tuple[str, ...], asked: int) -> tuple[float, ...] | None:
    """Return the words' probabilities relative to each other, or None if the words agree in all tokens.

    They are read at the first token at which an alternative fits exactly one word. ValueError if a token
    begins no word, if the probability of a word is missing, or if the reply has fewer tokens than `asked` and
    tells no words apart.
    """
    prefix = ""  # the reply's text before the current token
    for token, alternatives in choice.tokens:
        is_whole = _lists_all(token, alternatives, choice.logprobs)
        fits = [_fitting(prefix + text, words) for text, _ in alternatives]
        masses = [0.0] * len(words)
        for indices, (_, logprob) in zip(fits, alternatives, strict=True):
            if len(indices) == 1:
                masses[indices[0]] += math.exp(logprob)
        prefix += token
        fitting = _fitting(prefix, words) if token else []
        if not fitting:
            raise ValueError(f"{prefix[:40]!r} begins none of {words}")
        if not any(masses) or (0 in masses and len(fitting) > 1):
            continue
        # Where all words are possible, none has a probability of 0.
        if 0 in masses and (is_whole or not all(fits)):
            raise ValueError(f"the reply has no probability of {words[masses.index(0)]!r}")
        # A word behind the likeliest tokens has at most what they leave, and no more than the last of them.
        listed = [math.exp(logprob) for _, logprob in alternatives]
        behind = max(0.0, min(1 - sum(listed), *listed))
        masses = [mass or behind for mass in masses]
        return tuple(mass / sum(masses) for mass in masses)
    if len(choice.tokens) < asked:
        raise ValueError(f"{len(choice.tokens)} tokens of {asked}, and no word yet")
    return None


def _fitting(text: str, words: tuple[str, ...]) -> list[int]:
    """The indices of the words that a text begins, or that begin it."""
    return [i for i, word in enumerate(words) if word.startswith(text) or text.startswith(word)]


def _lists_all(token: str, alternatives: list[tuple[str, float]], logprobs: LogProbs | None) -> bool:
    """True if no other token is possible: there are fewer than were asked for, or one has no probability.

    ValueError if their probabilities do not sum to one then. In a completion two tokens of one text, a letter
    and its byte, are one entry, so that the probability of one of them is missing.
    """
    probabilities = [math.exp(logprob) for _, logprob in alternatives]
    if len(alternatives) >= ALTERNATIVES and all(probabilities):
        return False
    is_chat = logprobs is not None and logprobs.content is not None
    may_miss_one = not is_chat and any(len(text) == 1 for text, _ in alternatives)
    if (total := sum(probabilities)) < 1 - rounding(alternatives) and not may_miss_one:
        raise ValueError(
            f"the alternatives of {token[:40]!r} have a probability of {total:.4g} together: some are missing"
        )
    return True
