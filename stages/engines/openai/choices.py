"""Choices between words, read from a reply's text or from the alternatives of its tokens."""

from __future__ import annotations

import math
import re

from stages.prompts.answers import after_thought


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


def choice_probabilities(
    tokens: list[tuple[str, dict[str, float]]], words: tuple[str, ...]
) -> tuple[float, ...] | None:
    """Return the words' probabilities relative to each other, or None if the tokens do not tell them apart.

    They are read at the first token at which an alternative fits exactly one word. tokens: text of each token
    of the reply, with the log-probabilities of its alternatives. ValueError if at a token no alternative fits
    any word.
    """
    prefix = ""  # the reply's text before the current token
    for token, alternatives in tokens:
        masses = [0.0] * len(words)
        any_fits = False
        for text, logprob in alternatives.items():
            # An alternative fits a word if one of the two texts begins with the other.
            fits = [word.startswith(prefix + text) or (prefix + text).startswith(word) for word in words]
            any_fits |= any(fits) and bool(text) and math.exp(logprob) > 0
            if sum(fits) == 1:
                masses[fits.index(True)] += math.exp(logprob)
        if sum(masses) > 0:
            return tuple(mass / sum(masses) for mass in masses)
        if not any_fits:
            raise ValueError(f"none of the alternatives after {prefix!r} begins one of {words}")
        prefix += token
    return None
