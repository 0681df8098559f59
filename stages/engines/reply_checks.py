"""Replies of OpenAI-compatible servers, checked before they are believed.

The fields that are used are validated, all others ignored. A reply that is of another shape, contradicts
itself or has probabilities that cannot be is a ValueError.
"""

from __future__ import annotations

import json
import math
import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

from stages.prompts.thoughts import after_thought

ALTERNATIVES = 5
"""Likeliest tokens whose log-probabilities come with a choice among words."""
MAX_LOGPROB = 1e-4
"""Largest log-probability that is accepted: 0, and what rounding to four decimals may add."""
MAX_BEHIND = 0.05
"""How far the log-probability of a greedy token may be behind another one, for rounding."""
ROUNDING, BITS = 5e-4, 2**-8
"""How far log-probabilities may be off: by three decimals, and as a share by the 8 bits of bfloat16."""
BROKEN_OFF = ("abort", "error", "cancel", "content_filter", "fail", "incomplete", "timeout", "tool_call")
"""How reasons begin for which servers end an answer before its end, such as `cancelled`."""

LogProb = Annotated[float, Field(le=MAX_LOGPROB, allow_inf_nan=False, strict=True)]
Alternatives = list[tuple[str, float]]
"""Text and log-probability of the likeliest tokens at one place."""


class _Part(BaseModel):
    """A part of a reply, which says of itself that it is none if it has an error or a refusal."""

    error: None = None
    refusal: Literal["", None] = None


class _Alternative(BaseModel):
    token: str
    logprob: LogProb


class _Token(BaseModel):
    token: str
    top_logprobs: list[_Alternative]


class LogProbs(BaseModel):
    """Log-probabilities: a chat has them in `content`, a completion in two lists of equal length."""

    content: list[_Token] | None = None
    tokens: list[str] = []
    top_logprobs: list[dict[str, LogProb]] = []

    def per_token(self) -> list[tuple[str, Alternatives]]:
        """For each token: its text and its alternatives."""
        if self.content is not None:
            return [(t.token, [(a.token, a.logprob) for a in t.top_logprobs]) for t in self.content]
        return [(t, list(a.items())) for t, a in zip(self.tokens, self.top_logprobs, strict=True)]


class _Message(_Part):
    content: str | None = None
    tool_calls: Annotated[list[Any], Field(max_length=0)] | None = None


class ReplyChoice(_Part):
    """The only choice of a reply. Reading a property whose fields are missing is a ValueError."""

    index: Annotated[int, Field(ge=0, le=0, strict=True)] = 0
    finish_reason: str | None = None
    stop_reason: Any = None
    message: _Message | None = None
    delta: None = None
    text: str | None = None
    logprobs: LogProbs | None = None
    token_ids: list[Annotated[int, Field(ge=0, lt=2**31)]] | None = None

    @property
    def content(self) -> str:
        """The text of a chat or a completion; empty if thinking used up all tokens."""
        if self.message is None and self.text is None:
            raise ValueError("the reply has no text")
        text = (self.text if self.message is None else self.message.content) or ""
        text.encode()  # ValueError for a lone surrogate, which no file could hold
        return text

    @property
    def tokens(self) -> list[tuple[str, Alternatives]]:
        """For each token: its text and alternatives; ValueError unless they write the reply's text."""
        if self.logprobs is None:
            raise ValueError("the reply has no log-probabilities")
        tokens = self.logprobs.per_token()
        for token, alternatives in tokens:
            _check_alternatives(token, alternatives)
        said = "" if self.message is None and self.text is None else "".join(self.content.split())
        written = "".join("".join(text for text, _ in tokens).split())
        if not written.startswith(said):
            raise ValueError(f"the text is {said[:40]!r}, and the tokens write {written[:40]!r}")
        return tokens


def _check_alternatives(token: str, alternatives: Alternatives) -> None:
    """Raise ValueError unless the alternatives can be the likeliest tokens of one distribution.

    Their probabilities sum to at most one, and the token itself is among them: requests for a choice are
    greedy, and vLLM always adds the token that it took.
    """
    total = sum(math.exp(logprob) for _, logprob in alternatives)
    if total > 1 + _rounding(alternatives):
        raise ValueError(f"the alternatives of {token[:40]!r} have a probability of {total:.4g} together")
    taken = max((logprob for text, logprob in alternatives if text == token), default=-math.inf)
    if alternatives and taken < max(logprob for _, logprob in alternatives) - MAX_BEHIND:
        raise ValueError(f"{token[:40]!r} was taken, and is not the likeliest of its alternatives")


def _rounding(alternatives: Alternatives) -> float:
    """Return by how much the sum of the alternatives' probabilities may be off."""
    return ROUNDING - BITS * sum(math.exp(logprob) * logprob for _, logprob in alternatives)


class _Usage(BaseModel):
    completion_tokens: Annotated[int, Field(ge=1, strict=True)] | None = None


class Reply(_Part):
    id: Any = None
    model: str | None = None
    choices: Annotated[list[ReplyChoice], Field(min_length=1, max_length=1)]
    object: str = ""
    status: Any = None
    usage: _Usage | None = None


def parse_reply(body: str, model: str, most_tokens: int) -> Reply:
    """Parse the reply to a request for at most so many tokens of a model; ValueError if it cannot be that."""
    reply = Reply.model_validate(json.loads(body, object_pairs_hook=_unique))
    if reply.model is not None and not _names(reply.model, model):
        raise ValueError(f"the reply is by {reply.model[:80]}, not by {model}")
    (choice,) = reply.choices
    for reason in (choice.finish_reason, choice.stop_reason, reply.status, reply.object):
        # A server that shuts down returns what it has of its answers, as vLLM does with `abort`.
        if isinstance(reason, str) and (reason.lower().startswith(BROKEN_OFF) or reason.endswith(".chunk")):
            raise ValueError(f"the server broke its answer off: {reason[:40]}")
    used = (reply.usage and reply.usage.completion_tokens) or 0
    if max(used, len(choice.token_ids or ())) > most_tokens:
        raise ValueError(f"the reply has {used} tokens, and {most_tokens} were asked for")
    return reply


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise ValueError(f"a field stands twice among {', '.join(fields)[:80]}")
    return fields


def _names(replying: str, model: str) -> bool:
    """True if a reply by this name may be the model's.

    A hub in front of servers may leave the owner out, and a reply to an alias has its dated version.
    """
    short = re.escape(model.rpartition("/")[2])
    return replying == model or re.fullmatch(rf"{short}(-\d[\d-]*)?", replying) is not None


def choice_probabilities(choice: ReplyChoice, words: tuple[str, ...], asked: int) -> tuple[float, ...] | None:
    """Return the words' probabilities relative to each other, or None if the words agree in all tokens.

    They are read at the first token at which an alternative fits exactly one word. ValueError if a token
    begins no word, if the probability of a word is missing, or if the reply has fewer tokens than `asked` and
    tells no words apart.
    """
    is_chat = choice.logprobs is not None and choice.logprobs.content is not None
    prefix = ""  # the reply's text before the current token
    for token, alternatives in choice.tokens:
        is_whole = _lists_all(token, alternatives, is_chat)
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


def _lists_all(token: str, alternatives: Alternatives, is_chat: bool) -> bool:
    """True if no other token is possible: there are fewer than were asked for, or one has no probability.

    ValueError if their probabilities do not sum to one then. In a completion two tokens of one text, a letter
    and its byte, are one entry, so that the probability of one of them is missing.
    """
    probabilities = [math.exp(logprob) for _, logprob in alternatives]
    if len(alternatives) >= ALTERNATIVES and all(probabilities):
        return False
    may_miss_one = not is_chat and any(len(text) == 1 for text, _ in alternatives)
    if sum(probabilities) < 1 - _rounding(alternatives) and not may_miss_one:
        raise ValueError(f"alternatives of {token[:40]!r} are missing: the others do not sum to 1")
    return True


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
