"""Sizes and kinds of choice requests, known before they are sent."""

from stages.engines import ChoiceRequest

MAX_WORD_TOKENS = 8
REPLY_TOKENS = 16
"""Room for a word and for what a model writes around it."""
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
