"""Replies of servers: their schema.

The fields that are used are validated, all others ignored. A reply of another shape, or with probabilities
that cannot be, is a ValueError, on which the transport sends the request again.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from fnmatch import fnmatchcase
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from stages.engines import Completion

MAX_LOGPROB = 1e-4
"""Largest log-probability that is accepted: 0, and what rounding to four decimals may add."""
MAX_BEHIND = 0.05
"""How far the log-probability of a greedy token may be behind another one, for rounding."""
ROUNDING, BITS = 5e-4, 2**-8
"""How far log-probabilities may be off: by three decimals, and as a share by the 8 bits of bfloat16."""

BROKEN_OFF = ("abort", "error", "cancel", "content_filter", "fail", "timeout")
"""How reasons begin for which servers end an answer before its end, such as `cancelled`."""

LogProb = Annotated[float, Field(le=MAX_LOGPROB, allow_inf_nan=False, strict=True)]
AnyLogProb = Annotated[float, Field(allow_inf_nan=False, strict=True)] | None
TokenId = Annotated[int, Field(ge=0, lt=2**31)]


class _Lenient(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)


class _Alternative(_Lenient):
    token: str
    logprob: LogProb


class _Token(_Lenient):
    token: str
    logprob: AnyLogProb = None
    top_logprobs: list[_Alternative]


class LogProbs(_Lenient):
    """Log-probabilities: a chat has them in `content`, a completion in two lists of equal length."""

    content: list[_Token] | None = None
    tokens: list[str] = []
    token_logprobs: list[AnyLogProb] = []
    top_logprobs: list[dict[str, LogProb]] = []

    @model_validator(mode="after")
    def _check(self) -> LogProbs:
        if self.content is None and len(self.tokens) != len(self.top_logprobs):
            raise ValueError(f"{len(self.tokens)} tokens with {len(self.top_logprobs)} log-probabilities")
        stated = self.token_logprobs if self.content is None else [t.logprob for t in self.content]
        tokens = self.per_token()
        for (token, alternatives), logprob in zip(tokens, stated or [None] * len(tokens), strict=True):
            _check_alternatives(token, alternatives, logprob)
        return self

    def per_token(self) -> list[tuple[str, list[tuple[str, float]]]]:
        """For each token: its text, and the text and log-probability of each alternative."""
        if self.content is not None:
            return [(t.token, [(a.token, a.logprob) for a in t.top_logprobs]) for t in self.content]
        return [(t, list(a.items())) for t, a in zip(self.tokens, self.top_logprobs, strict=True)]


def _check_alternatives(token: str, alternatives: list[tuple[str, float]], stated: float | None) -> None:
    """Raise ValueError unless the alternatives can be the likeliest tokens of one distribution.

    Their probabilities sum to at most one, and the token itself is among them: requests for a choice are
    greedy, and vLLM always adds the token that it took. A text may stand twice: a letter and the byte that
    writes it are two tokens. stated: the token's log-probability beside them, if there is one.
    """
    total = sum(math.exp(logprob) for _, logprob in alternatives)
    if total > 1 + rounding(alternatives):
        raise ValueError(f"the alternatives of {token[:40]!r} have a probability of {total:.4g} together")
    if not alternatives:
        return
    taken = max((logprob for text, logprob in alternatives if text == token), default=None)
    if taken is None:
        raise ValueError(f"{token[:40]!r} is not among its alternatives")
    if taken < max(logprob for _, logprob in alternatives) - MAX_BEHIND:
        raise ValueError(f"{token[:40]!r} was taken, and is not the likeliest of its alternatives")
    if stated is not None and abs(stated - taken) > MAX_BEHIND:
        raise ValueError(f"{token[:40]!r} has two log-probabilities, {stated:.4g} and {taken:.4g}")


def rounding(alternatives: list[tuple[str, float]]) -> float:
    """Return by how much the sum of the alternatives' probabilities may be off."""
    return ROUNDING - BITS * sum(math.exp(logprob) * logprob for _, logprob in alternatives)


class _Message(_Lenient):
    content: str | None = None
    refusal: Literal["", None] = None
    tool_calls: Annotated[list[Any], Field(max_length=0)] | None = None


class _PromptToken(_Lenient):
    logprob: LogProb


class ReplyChoice(_Lenient):
    """One choice of a reply. Reading a property whose fields are missing is a ValueError."""

    index: Literal[0] = 0
    finish_reason: str | None = None
    message: _Message | None = None
    text: str | None = None
    logprobs: LogProbs | None = None
    token_ids: list[TokenId] | None = None
    prompt_logprobs: list[dict[int, _PromptToken] | None] | None = None

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
        self._said.encode()  # ValueError for a lone surrogate, which no file could hold
        return self._said

    @property
    def _said(self) -> str:
        return (self.text if self.message is None else self.message.content) or ""

    @property
    def completion(self) -> Completion:
        if self.token_ids is None:
            raise ValueError("the reply has no token ids")
        return Completion(self.token_ids, self.finish_reason == "stop")

    @property
    def tokens(self) -> list[tuple[str, list[tuple[str, float]]]]:
        """For each token: its text, and the text and log-probability of each alternative.

        ValueError if the reply's text, where it has one, is not what these tokens write.
        """
        if self.logprobs is None:
            raise ValueError("the reply has no log-probabilities")
        tokens = self.logprobs.per_token()
        said, written = ("".join(text.split()) for text in (self._said, "".join(text for text, _ in tokens)))
        if not written.startswith(said):
            raise ValueError(f"the text is {said[:40]!r}, and the tokens write {written[:40]!r}")
        return tokens


class _Usage(_Lenient):
    completion_tokens: Annotated[int, Field(ge=1)] | None = None


class Reply(_Lenient):
    model: str | None = None
    choices: list[ReplyChoice] = Field(min_length=1, max_length=1)
    error: None = None
    """An error beside an answer contradicts it."""
    object: str | None = None
    usage: _Usage | None = None

    @field_validator("object")
    @classmethod
    def _refuse_part(cls, kind: str | None) -> str | None:
        if kind is not None and (kind.endswith(".chunk") or kind == "error"):
            raise ValueError(f"the reply is a part of a stream, or an error: {kind[:40]}")
        return kind


def least_probability(choice: ReplyChoice, completion: list[int]) -> float:
    """Return the least probability of the prompt's last tokens; ValueError if the reply lacks one."""
    if not completion:
        return 1.0
    tokens = (choice.prompt_logprobs or [])[-len(completion) :]
    pairs = zip(tokens, completion, strict=False)
    logprobs = [token[id].logprob for token, id in pairs if token and id in token]
    if len(logprobs) < len(completion):
        raise ValueError("no log-probabilities of the prompt's tokens")
    return math.exp(min(logprobs))


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
