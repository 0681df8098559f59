"""Chats in requests to OpenAI's and Anthropic's endpoints: their question, and the prompt of their mode."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from stages.config import ROUTED as AUTO
from stages.records import Example

CHAT, RESPONSES, MESSAGES = "/v1/chat/completions", "/v1/responses", "/v1/messages"


class Refusal(Exception):
    """An error that the client is told, with a status."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class ModePrompt:
    """The prompt of a mode in training, apart from the question."""

    system: str | None = None
    """System message."""
    template_arguments: dict[str, Any] = field(default_factory=dict)
    """Arguments of the chat template."""


def in_mode(content: dict[str, Any], path: str, prompt: ModePrompt) -> dict[str, Any]:
    """The request with the prompt of its mode, where its endpoint takes chats.

    What the request says itself counts: its system message, and each argument of the template.
    """
    if path in (CHAT, RESPONSES, MESSAGES) and prompt.template_arguments:
        arguments = prompt.template_arguments | (content.get("chat_template_kwargs") or {})
        content = {**content, "chat_template_kwargs": arguments}
    return _with_system(content, path, prompt.system)


def _with_system(content: dict[str, Any], path: str, system: str | None) -> dict[str, Any]:
    messages = content.get("messages")
    if not system:
        return content
    if path == CHAT and isinstance(messages, list) and not any(map(_is_system, messages)):
        return {**content, "messages": [{"role": "system", "content": system}, *messages]}
    if path == MESSAGES and not content.get("system"):
        return {**content, "system": system}
    inputs = content.get("input")
    instructed = content.get("instructions") or (isinstance(inputs, list) and any(map(_is_system, inputs)))
    if path == RESPONSES and not instructed:
        return {**content, "instructions": system}
    return content


def question(path: str, content: dict[str, Any]) -> Example:
    """Return what a chat asks, as an example to vote on: its last message of the user, after earlier turns.

    Refusal if that cannot be told.
    """
    messages = content.get("input" if path == RESPONSES else "messages")
    if path == RESPONSES and isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    if path not in (CHAT, RESPONSES, MESSAGES) or not isinstance(messages, list):
        raise Refusal(400, f"model {AUTO} answers chats: POST {CHAT} with messages")
    turns = [
        (_role(message), _text(message)) for message in messages if _role(message) in ("user", "assistant")
    ]
    asked = [i for i, (role, _) in enumerate(turns) if role == "user"]
    if not asked:
        raise Refusal(400, f"model {AUTO} needs a user message")
    earlier = [[turns[i][1], turns[i + 1][1]] for i in asked[:-1] if turns[i + 1][0] == "assistant"]
    return Example("question", turns[asked[-1]][1], "", None, turns=earlier)


def _is_system(message: Any) -> bool:
    return _role(message) in ("system", "developer")


def _role(message: Any) -> Any:
    return message.get("role") if isinstance(message, dict) else None


def _text(message: dict[str, Any]) -> str:
    """The text of a message, which may come in parts. Half a surrogate pair is no text, and becomes `?`."""
    content = message.get("content")
    if isinstance(content, list):
        parts = [part.get("text") for part in content if isinstance(part, dict)]
        content = "\n".join(part for part in parts if isinstance(part, str))
    return content.encode(errors="replace").decode() if isinstance(content, str) else ""


def json_object(body: bytes) -> dict[str, Any]:
    """The object in a body; Refusal if there is none."""
    try:
        content = json.loads(body)
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise Refusal(400, "the body is no JSON object")
    return content
