"""The shape of a server's reply: what of it is used is checked before it is believed.

ValueError for anything else, which the transport takes for an unreadable answer and asks again.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

ROUNDING = 1e-3
"""How far above zero a log-probability may be: servers compute them in 16 bits."""

LogProb = Annotated[float, Field(le=ROUNDING, allow_inf_nan=False)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]


class _Shape(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)


class _Alternative(_Shape):
    token: str
    logprob: LogProb


class _Token(_Shape):
    token: str
    top_logprobs: list[_Alternative]


class _LogProbs(_Shape):
    """Of a chat in `content`, of a completion in two lists."""

    content: list[_Token] | None = None
    tokens: list[str] = []
    top_logprobs: list[dict[str, LogProb]] = []

    @model_validator(mode="after")
    def _even(self) -> _LogProbs:
        if self.content is None and len(self.tokens) != len(self.top_logprobs):
            raise ValueError(f"{len(self.tokens)} tokens with {len(self.top_logprobs)} log-probabilities")
        return self


class _Message(_Shape):
    content: str | None = None


class Completion(_Shape):
    """One choice of a reply. What is asked of it and is not there is a ValueError."""

    index: Literal[0] = 0
    finish_reason: str | None = None
    message: _Message | None = None
    text: str | None = None
    logprobs: _LogProbs | None = None
    token_ids: list[TokenId] | None = None

    @property
    def content(self) -> str:
        """The text of a chat or a completion; empty if a thought used up all tokens."""
        if self.message is None and self.text is None:
            raise ValueError("the reply has no text")
        return (self.text if self.message is None else self.message.content) or ""

    @property
    def ids(self) -> list[int]:
        if self.token_ids is None:
            raise ValueError("the reply has no token ids")
        return self.token_ids

    @property
    def tokens(self) -> list[tuple[str, dict[str, float]]]:
        """For each token: its text and the log-probabilities of the alternatives."""
        if self.logprobs is None:
            raise ValueError("the reply has no log-probabilities")
        if self.logprobs.content is not None:
            return [(t.token, {a.token: a.logprob for a in t.top_logprobs}) for t in self.logprobs.content]
        return list(zip(self.logprobs.tokens, self.logprobs.top_logprobs, strict=True))


class Reply(_Shape):
    model: str | None = None
    choices: list[Completion] = Field(min_length=1, max_length=1)


class _Entry(_Shape):
    id: str
    max_model_len: Annotated[int, Field(ge=0)] | None = None


class _Models(_Shape):
    data: list[_Entry]


class _Count(_Shape):
    count: int = Field(ge=0)


def count_of(reply: Any) -> int:
    """The number of tokens that a server has counted."""
    return _Count.model_validate(reply).count


def models_of(reply: Any) -> dict[str, int]:
    """The models that a server lists, each with its longest context in tokens; 0 if it is not told."""
    return {entry.id: entry.max_model_len or 0 for entry in _Models.model_validate(reply).data}
