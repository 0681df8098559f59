"""The bodies of requests, with the parameters that a server accepts, and the sizes of choice requests."""

import logging
from typing import Any

from stages.engines import ChoiceRequest, GenerateRequest, Sampling

log = logging.getLogger(__name__)

MAX_WORD_TOKENS = 8
REPLY_TOKENS = 16
"""Room for a word and for what a model writes around it."""
ALTERNATIVES = 5
"""Likeliest tokens whose log-probabilities come with a choice among words."""
MESSAGE_BYTES = 64
"""Upper bound of what a chat template puts around a message."""


def max_reply_tokens(request: ChoiceRequest) -> int:
    """Return the most tokens of a reply, for which the prompt must leave room."""
    return request.max_thinking_tokens + REPLY_TOKENS if request.max_thinking_tokens else MAX_WORD_TOKENS


def is_chat(request: ChoiceRequest) -> bool:
    """Whether the request is a chat, rather than a text or token ids to be continued."""
    return not isinstance(request.text, str) and isinstance(request.text[0], dict)


def most_prompt_tokens(request: ChoiceRequest) -> int:
    """Return an upper bound of the prompt's tokens without a tokenizer: a token is at least one byte."""
    if isinstance(request.text, str):
        return len(request.text.encode())
    # Messages of a chat, or token ids.
    return sum(
        MESSAGE_BYTES + len(item["content"].encode()) if isinstance(item, dict) else 1
        for item in request.text
    )


def choice_body(
    model: str, request: ChoiceRequest, tokens: int, alternatives: int = 0
) -> tuple[str, dict[str, Any]]:
    """Return the path and the body of a request for a choice, with so many tokens of reply at the most.

    alternatives: likeliest tokens whose log-probabilities the reply is to have; 0 for none.
    """
    body: dict[str, Any] = {"model": model, "max_tokens": tokens}
    if is_chat(request):
        logprobs = {"logprobs": True, "top_logprobs": alternatives} if alternatives else {}
        return "chat/completions", {**body, **logprobs, "messages": request.text}
    logprobs = {"logprobs": alternatives} if alternatives else {}
    return "completions", {**body, **logprobs, "prompt": request.text}


def constrained_body(
    model: str, request: ChoiceRequest, words: tuple[str, ...], tokens: int
) -> tuple[str, dict[str, Any]]:
    """Like `choice_body`, with the reply constrained to one of the words."""
    path, body = choice_body(model, request, tokens, ALTERNATIVES)
    return path, {**body, "temperature": 0, "structured_outputs": {"choice": list(words)}}


def generate_body(model: str, request: GenerateRequest, sampling: Sampling) -> dict[str, Any]:
    """Return the body of a request for a completion of token ids."""
    return {
        "model": model,
        "prompt": request.ids,
        "max_tokens": sampling.max_new_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k or -1,  # without it vLLM takes the one in generation_config
        "seed": request.seed,
        "stop": list(request.stop) or None,
        "stop_token_ids": list(sampling.stop_ids),
        "return_token_ids": True,
        "add_special_tokens": False,
    }


def prompt_probabilities_body(model: str, ids: list[int]) -> dict[str, Any]:
    """Return the body of a request for the log-probabilities of a prompt's own tokens."""
    return {
        "model": model, "prompt": ids, "max_tokens": 1, "temperature": 0, "prompt_logprobs": 0,
        "add_special_tokens": False,
    }  # fmt: skip


class Quirks:
    """Parameter changes that OpenAI's reasoning models need, learned from their HTTP 400 replies."""

    def __init__(self) -> None:
        self._renames_max_tokens = self._fixes_temperature = False

    def apply(self, body: dict[str, Any]) -> dict[str, Any]:
        """Return the request with the server's parameters in place of the usual ones."""
        body = dict(body)
        if self._renames_max_tokens:
            body["max_completion_tokens"] = body.pop("max_tokens")
        if self._fixes_temperature:
            del body["temperature"]
        return body

    def learn(self, refusal: str) -> None:
        """Note the parameter that a refusal names, if it is a known one."""
        if "max_completion_tokens" in refusal:
            self._renames_max_tokens = True
        elif "temperature" in refusal and not self._fixes_temperature:
            self._fixes_temperature = True
            log.warning(
                "the server accepts no temperature: its answers are sampled, and may differ next time"
            )
