"""Thoughts: what a model writes before its answer, between tags. Splits, hides and recognises them.

A chat template may open the thought in the prompt, so that a completion has the closing tag alone.
"""

from __future__ import annotations

import functools
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TAGS = {
    "<think>": "</think>",
    "<thinking>": "</thinking>",
    "<thought>": "</thought>",
    "[THINK]": "[/THINK]",
    "◁think▷": "◁/think▷",
    "<seed:think>": "</seed:think>",
    "<|channel>thought": "<channel|>",
    "<|channel|>analysis<|message|>": "<|channel|>final<|message|>",
    "to=self<|message|>": "to=user<|message|>",
    "<|START_THINKING|>": "<|END_THINKING|>",
    "<|inner_prefix|>": "<|inner_suffix|>",
}
"""Opening tags of thoughts → closing ones: most models', then those of Mistral, Kimi, Seed, Gemma, gpt-oss,
Muse, Cohere and Apertus."""
_OPENING = re.compile("|".join(map(re.escape, TAGS)))
_CLOSING = re.compile("|".join(map(re.escape, TAGS.values())))
_OPENED = re.compile(rf"(?:{_OPENING.pattern})\s*\Z")


def after_thought(text: str) -> str:
    """Return what follows the last thought of a text; nothing if a thought is not closed."""
    return "" if unclosed(text) else text[_last_end(text) :]


def unclosed(text: str) -> str:
    """Return the tag of a thought that is not closed; nothing if there is none."""
    opening = _OPENING.search(text, _last_end(text))
    return opening[0] if opening else ""


def _last_end(text: str) -> int:
    """The place after the last thought; 0 if there is none."""
    return max((closing.end() for closing in _CLOSING.finditer(text)), default=0)


def before(text: str) -> str:
    """Return what precedes the first thought of a text: all if there is none."""
    return _OPENING.split(text)[0]


def split(text: str) -> tuple[str, str]:
    """Split a response into its thought and its answer; one that begins with no thought is all answer."""
    opening = _OPENING.match(text.lstrip())
    if not opening:
        return "", text
    thought, closing, answer = text.lstrip()[opening.end() :].partition(TAGS[opening[0]])
    return (thought.strip(), answer.lstrip()) if closing else ("", text)


def opened(prompt: str) -> str:
    """Return the tag, with the space after it, of a thought that a prompt ends in; else nothing."""
    match = _OPENED.search(prompt)
    return match[0] if match else ""


def tagged(thought: str, tag: str = "<think>") -> str:
    """Return a thought as it stands before an answer, between tags; nothing if there is none."""
    space = "" if tag.startswith("<|") else "\n\n"  # tags that are tokens stand right before the answer
    return f"{tag}\n{thought}\n{TAGS[tag]}{space}" if thought else ""


def is_closed(prompt: str) -> bool:
    """True if a prompt ends in a thought that is closed, so that an answer without one follows."""
    return prompt.rstrip().endswith(tuple(TAGS.values()))


def decode(tokenizer: PreTrainedTokenizerBase, ids: list[int], prompt: str) -> str:
    """Return a completion's text without special tokens, after the tag of a thought that its prompt opens.

    Special tokens of tags stay: without them, a thought would be taken for the answer.
    """
    special, of_tags = _special_ids(tokenizer)
    if of_tags:
        text = tokenizer.decode([token for token in ids if token not in special or token in of_tags])
    else:
        text = tokenizer.decode(ids, skip_special_tokens=True)
    return opened(prompt) + str(text)


@functools.lru_cache(maxsize=2)
def _special_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[frozenset[int], frozenset[int]]:
    """The ids of special tokens, and those of them that are parts of tags."""
    special = {
        number: str(token) for number, token in tokenizer.added_tokens_decoder.items() if token.special
    }
    tags = [*TAGS, *TAGS.values()]
    of_tags = {number for number, token in special.items() if any(token in tag for tag in tags)}
    return frozenset(special), frozenset(of_tags)
