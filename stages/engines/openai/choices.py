"""Which of a ballot's words a reply gives: read from its text, or from the alternatives of its tokens."""

from __future__ import annotations

import math
import re

from stages.prompts.answers import after_thought


def word_of(text: str, words: tuple[str, ...]) -> int | None:
    """Index of the word that a reply gives, or None if it gives no word or different ones.

    Reading is strict: the first or last line after the thought must be the word and nothing else. Case,
    spaces, punctuation, markup and a leading "the answer is" are ignored.
    """
    lines = [line for line in after_thought(text).splitlines() if line.strip()]
    plain = [_bare(word) for word in words]
    found = {plain.index(bare) for line in {*lines[:1], *lines[-1:]} if (bare := _bare(line)) in plain}
    return found.pop() if len(found) == 1 else None


def _bare(text: str) -> str:
    words = " ".join(re.findall(r"[^\W_]+", text.casefold()))
    return re.sub(r"^(?:the )?(?:final )?answer (?:is )?", "", words).replace(" ", "")


def choice_probabilities(
    tokens: list[tuple[str, dict[str, float]]], words: tuple[str, ...]
) -> tuple[float, ...] | None:
    """Each word's share at the first token whose alternatives fit exactly one word; None if there is none.

    ValueError if at a token no alternative fits any word.
    """
    before = ""
    for token, alternatives in tokens:
        mass = [0.0] * len(words)
        seen = False
        for text, value in alternatives.items():
            fits = [word.startswith(before + text) or (before + text).startswith(word) for word in words]
            seen |= any(fits) and bool(text) and math.exp(value) > 0
            if sum(fits) == 1:
                mass[fits.index(True)] += math.exp(value)
        if sum(mass) > 0:
            return tuple(part / sum(mass) for part in mass)
        if not seen:
            raise ValueError(f"none of the alternatives after {before!r} begins one of {words}")
        before += token
    return None
