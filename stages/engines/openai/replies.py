"""Replies of servers: their schema, and the choices that are read from them.

The fields that are used are validated, all others ignored. A reply of another shape, or with probabilities
that cannot be, is a ValueError, on which the transport sends the request again.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from fnmatch import fnmatchcase
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from stages.engines import Completion
from stages.prompts.thoughts import after_thought

MAX_LOGPROB = 1e-4
"""Largest log-probability that is accepted: 0, and what rounding to four decimals may add."""
MAX_BEHIND = 0.05
"""How far the log-probability of a greedy token may be behind another one, for rounding."""
MAX_SUM = 1.01
"""Largest sum of the alternatives' probabilities: 1, and what rounding to the 8 bits of bfloat16 may add."""

BROKEN_OFF = ("abort", "error", "cancel", "timeout")
"""How reasons begin for which servers end an answer before its end, such as `cancelled`."""

LogProb = Annotated[float, Field(le=MAX_LOGPROB, allow_inf_nan=False, strict=True)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]


class _Lenient(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)


class _Alternative(_Lenient):
    token: str
    logprob: LogProb


class _Token(_Lenient):
    token: str
    top_logprobs: list[_Alternative]


class _LogProbs(_Lenient):
    """Log-probabilities: a chat has them in `content`, a completion in two lists of equal length."""

    content: list[_Token] | None = None
    tokens: list[str] = []
    top_logprobs: list[dict[str, LogProb]] = []

    @model_validator(mode="after")
    def _check(self) -> _LogProbs:
        if self.content is None and len(self.tokens) != len(self.top_logprobs):
            raise ValueError(f"{len(self.tokens)} tokens with {len(self.top_logprobs)} log-probabilities")
        for token, alternatives in self.per_token():
            _check_alternatives(token, alternatives)
        return self

    def per_token(self) -> list[tuple[str, list[tuple[str, float]]]]:
        """For each token: its text, and the text and log-probability of each alternative."""
        if self.content is not None:
            return [(t.token, [(a.token, a.logprob) for a in t.top_logprobs]) for t in self.content]
        return [(t, list(a.items())) for t, a in zip(self.tokens, self.top_logprobs, strict=True)]


def _check_alternatives(token: str, alternatives: list[tuple[str, float]]) -> None:
    """Raise ValueError unless the alternatives can be the likeliest tokens of one distribution.

    Their probabilities sum to at most one, and the token itself is among them: requests for a choice are
    greedy, and vLLM always adds the token that it took. A text may stand twice: a letter and the byte that
    writes it are two tokens.
    """
    total = sum(math.exp(logprob) for _, logprob in alternatives)
    if total > MAX_SUM:
        raise ValueError(f"the alternatives of {token[:40]!r} have a probability of {total:.4g} together")
    taken = [logprob for text, logprob in alternatives if text == token]
    if alternatives and not taken:
        raise ValueError(f"{token[:40]!r} is not among its alternatives")
    likeliest = max((logprob for _, logprob in alternatives), default=0.0)
    if taken and max(taken) < likeliest - MAX_BEHIND:
        raise ValueError(f"{token[:40]!r} was taken, and is not the likeliest of its alternatives")


def _logprob_by_text(alternatives: list[tuple[str, float]]) -> dict[str, float]:
    """Return the log-probability of each text, the log of the sum of the probabilities of its tokens."""
    logprobs: dict[str, float] = {}
    for text, logprob in alternatives:
        if text in logprobs:
            low, high = sorted((logprob, logprobs[text]))
            logprob = high + math.log1p(math.exp(low - high))  # log(exp(low) + exp(high))
        logprobs[text] = logprob
    return logprobs


class _Message(_Lenient):
    content: str | None = None


class ReplyChoice(_Lenient):
    """One choice of a reply. Reading a property whose fields are missing is a ValueError."""

    index: Literal[0] = 0
    finish_reason: str | None = None
    message: _Message | None = None
    text: str | None = None
    logprobs: _LogProbs | None = None
    token_ids: list[TokenId] | None = None

    @field_validator("finish_reason")
    @classmethod
    def _refuse_broken_off(cls, reason: str | None) -> str | None:
        """A server that shuts down returns what it has of its answers, as vLLM does with `abort`."""
        if (reason or "").lower().startswith(BROKEN_OFF):
            raise ValueError(f"the server broke its answer off: {reason}")
        return reason

    @property
    def content(self) -> str:
        """The text of a chat or a completion; empty if thinking used up all tokens."""
        if self.message is None and self.text is None:
            raise ValueError("the reply has no text")
        text = (self.text if self.message is None else self.message.content) or ""
        text.encode()  # ValueError for a lone surrogate, which no file could hold
        return text

    @property
    def completion(self) -> Completion:
        if self.token_ids is None:
            raise ValueError("the reply has no token ids")
        return Completion(self.token_ids, self.finish_reason == "stop")

    @property
    def tokens(self) -> list[tuple[str, dict[str, float]]]:
        """For each token: its text and the log-probability of each alternative, of equal texts together."""
        if self.logprobs is None:
            raise ValueError("the reply has no log-probabilities")
        return [(token, _logprob_by_text(alternatives)) for token, alternatives in self.logprobs.per_token()]


class Reply(_Lenient):
    model: str | None = None
    choices: list[ReplyChoice] = Field(min_length=1, max_length=1)
    error: None = None
    """An error beside an answer contradicts it."""
    object: str | None = None

    @field_validator("object")
    @classmethod
    def _refuse_part(cls, kind: str | None) -> str | None:
        if kind is not None and kind.endswith(".chunk"):
            raise ValueError("the reply is a part of a stream")
        return kind


class ServedModel(_Lenient):
    """A model that a server lists."""

    id: str
    max_model_len: Annotated[int, Field(ge=0)] = 0
    """Its longest context in tokens; 0 if unknown."""
    root: str | None = None
    """What it is loaded from, equal for all names of one model: vLLM lists each of them."""

    @field_validator("max_model_len", mode="before")
    @classmethod
    def _null_is_unknown(cls, value: Any) -> Any:
        return 0 if value is None else value

    def serves(self, name: str) -> bool:
        """True if it answers requests for `name`; a gateway may list a pattern, such as `*` for all names."""
        return name == self.id or ("*" in self.id and fnmatchcase(name, self.id))


class _Models(_Lenient):
    data: list[ServedModel]


class TokenCount(_Lenient):
    """A reply to `tokenize`."""

    count: int = Field(ge=0)


def parse_json(text: bytes) -> Any:
    """Parse a reply's body; ValueError if it is no JSON, or if an object names one field twice."""
    return json.loads(text, object_pairs_hook=_unique)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        repeated = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"the field {repeated[:40]!r} stands twice")
    return fields


def parse_models(reply: Any) -> dict[str, ServedModel]:
    """Read the models that a server lists, by name; some servers reply with the bare list, without `data`."""
    models = _Models.model_validate({"data": reply} if isinstance(reply, list) else reply)
    return {model.id: model for model in models.data}


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

    They are read at the first token at which an alternative fits exactly one word. ValueError if at a token
    no alternative fits any word, or if the reply has fewer tokens than `asked` and tells no words apart.
    """
    prefix = ""  # the reply's text before the current token
    for token, alternatives in choice.tokens:
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
    if len(choice.tokens) < asked:
        raise ValueError(f"{len(choice.tokens)} tokens of {asked}, and no word yet")
    return None
