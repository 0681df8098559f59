"""Formats of rows: which fields a row has, and the examples that it makes.

A row in chat format with several turns makes an example of its last answer, with the turns before as context.
"""

import json
import re
from typing import Any

from stages.errors import DataError
from stages.prompts import thoughts
from stages.prompts.answers import gold_from_response
from stages.records import Example
from stages.store.digests import id_of

FIELDS = {
    "gsm8k": ("question", "answer"),
    "alpaca": ("instruction", "output"),
    "messages": ("messages",),
    "prompt_completion": ("prompt", "completion"),
}
"""Format → fields that a row must have; in this order a format is detected."""
NAMES = {kind: " and ".join(fields) for kind, fields in FIELDS.items()} | {"messages": "chat"}
"""Format → what people call it."""
SYNONYMS = {"context": "input", "response": "output", "conversations": "messages"}
"""Names of fields in Dolly and ShareGPT → those here."""
ROLES = {
    "human": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant", "developer": "system"
}  # fmt: skip
"""Roles of ShareGPT and of OpenAI's newer chats → those here."""
THOUGHTS = ("reasoning_content", "thinking")
"""Names of the field, of a row or of a message, with what the model thinks before its response."""
CONTENT = ("content", "tool_calls", "function_call")
"""Fields of a message of which one must not be empty."""
RESPONSES = {"answer", "output", "completion"}
VERIFYING = ("gold", "test")
"""Fields of which one lets RL reward an answer; a row with one of them may have no response."""
CHOICE = re.compile(r"[A-J]|(?i:(?:option|choice)[ _-]?[a-j])")
"""Name of a field with one of a question's choices, such as `A` and `option_a`."""

BLANK = re.compile(r"[\s\u00ad\u200b-\u200f\u2060\ufeff]*")
"""A text of which nothing is seen."""


class EmptyRowError(ValueError):
    """Raised for a row with an empty prompt, or with neither a response nor a way to verify one."""


def detect(where: str, row: dict[str, Any], keeps_empty: bool = False) -> str:
    """Return the first format whose fields a row has; DataError if there is none.

    A row that does without a response may lack its field; see `examples`.
    """
    names = {SYNONYMS.get(name, name) for name in row}
    assumed = RESPONSES if keeps_empty or names & set(VERIFYING) else set()
    for present in (names, names | assumed):
        for kind, required in FIELDS.items():
            if present >= set(required):
                return kind
    raise DataError(
        f"{where}: cannot tell the format from the fields {', '.join(row)}",
        "; ".join(f"{NAMES[kind]}: {', '.join(required)}" for kind, required in FIELDS.items()),
    )


def example(kind: str, row: dict[str, Any], keeps_empty: bool = False) -> Example:
    """Convert a row in format `kind`; fields other than prompt, response and gold go to `extra`.

    A row whose answers can be verified by one of its fields, or any row with `keeps_empty`, may have no
    response: it makes an example whose response is empty.
    """
    # 0 is an answer, although it is false.
    may_lack = keeps_empty or any(row.get(name) or row.get(name) == 0 for name in VERIFYING)
    if kind == "messages":
        chat = _conversation(row.get("messages", row.get("conversations")))
        return _example(*chat, row, {"messages", "conversations"}, may_lack)
    is_alpaca, (asks, answers) = kind == "alpaca", FIELDS[kind]
    row = _with_one_name(row) if is_alpaca else row
    prompt = _instruction(row) if is_alpaca else text_field(row, asks)
    name, answer = _answer(row, answers, may_lack)
    return _example(prompt, [], answer, row, {asks, name, *(["input"] if is_alpaca else [])}, may_lack)


def _example(
    prompt: str, turns: list[list[str]], answer: Any, row: dict[str, Any], used: set[str], may_lack: bool
) -> Example:
    """Make an example; an answer that is a number or a boolean is verifiable as it stands."""
    is_text = isinstance(answer, str)
    if not is_text and "choices" in row:
        raise ValueError(
            "the answer is not text, and the row has choices: write them into the question, and the letter "
            "of the right one into answer and gold"
        )
    thought, response = thoughts.split(answer if is_text else gold_field(answer))
    for name in THOUGHTS:
        if isinstance(row.get(name), str):
            thought = thought or row[name].strip()
            used = used | {name}
    prompt, response = ("" if BLANK.fullmatch(text) else text for text in (prompt, response))
    if not prompt or not (response or may_lack):
        raise EmptyRowError("prompt or response is empty")
    gold = gold_field(row.get("gold")) or (gold_from_response(response) if is_text else response)
    extra = {name: value for name, value in row.items() if name not in used | {"gold"}}
    # Without a response, two rows with one prompt are told apart by the answer that is right.
    named = [prompt, response, *([turns] if turns else []), *([] if response else [gold])]
    named += [thought] if thought else []
    return Example(id_of(named), prompt, response, gold, extra, turns, thought)


def _answer(row: dict[str, Any], usual: str, may_lack: bool) -> tuple[str, Any]:
    """Return the field with the answer, the usual one or a synonym where that is lacking, and what is in it.

    That is empty if it may be lacking, else EmptyRowError is raised.
    """
    names = [usual, *(sorted(RESPONSES | {"response"}) if may_lack or usual not in row else [])]
    name = next((name for name in names if row.get(name)), usual)
    if row.get(name) is None and not may_lack:
        raise EmptyRowError("prompt or response is empty")
    return name, "" if row.get(name) is None else row[name]


def text_field(row: dict[str, Any], name: str) -> str:
    """Return a field of a row; ValueError if it is missing or not text."""
    value = row.get(name)
    if name in row and value is None:
        raise EmptyRowError(f"field {name} is empty")
    if not isinstance(value, str):
        got = "nothing" if value is None else type(value).__name__
        raise ValueError(f"field {name} must be text, got {got}")
    return value


def other_fields(row: dict[str, Any], *used: str) -> dict[str, Any]:
    """Return the fields of a row that a benchmark does not read: a label, or what splits the results.

    Lists and objects are left out; HumanEval+ has megabytes of them.
    """
    simple = (str, int, float, bool, type(None))
    return {name: value for name, value in row.items() if name not in used and isinstance(value, simple)}


def gold_field(value: Any) -> str:
    """Return a verifiable answer as text; empty for None, ValueError for lists and objects."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return json.dumps(value)
    if not isinstance(value, str | int | float):
        raise ValueError(f"the answer must be text, a number or a boolean, got {type(value).__name__}")
    return str(value).strip()


def instruction(row: dict[str, Any]) -> str:
    """Return the prompt of a row in the format of alpaca or Dolly; DataError if its fields conflict."""
    try:
        return _instruction(_with_one_name(row))
    except ValueError as error:
        raise DataError(str(error)) from None


def _instruction(row: dict[str, Any]) -> str:
    context = row.get("input") or ""
    return text_field(row, "instruction") + (f"\n\n{context}" if context else "")


def _with_one_name(row: dict[str, Any]) -> dict[str, Any]:
    """Rename fields by SYNONYMS; of two fields with one meaning, the one that is not empty counts.

    ValueError if both have a value and the values differ.
    """
    renamed: dict[str, Any] = {}
    for original, value in row.items():
        name = SYNONYMS.get(original, original)
        if renamed.get(name) and value and renamed[name] != value:
            raise ValueError(f"fields {name} and {original} mean the same, and their values differ")
        renamed[name] = renamed.get(name) or value
    return renamed


def _conversation(messages: Any) -> tuple[str, list[list[str]], str]:
    """Return prompt, earlier turns and response of the last answer; the first prompt gets the system message.

    If the user has the last word, the response is empty.
    """
    if not isinstance(messages, list) or not messages or not all(isinstance(m, dict) for m in messages):
        raise ValueError("messages must be a list of objects with role and content")
    # Some have an assistant's message without any content at their end.
    null = messages[-1].get("role") == "assistant" and not any(messages[-1].get(name) for name in CONTENT)
    turns = [_turn(message) for message in (messages[:-1] if null else messages)]
    head = ""
    if turns and turns[0][0] == "system":
        (_, head), turns = turns[0], turns[1:]
    if turns and turns[-1][0] == "user":
        turns.append(("assistant", ""))
    roles = [role for role, _ in turns]
    if not roles:
        raise EmptyRowError("prompt or response is empty")
    if roles != ["user", "assistant"] * (len(roles) // 2):
        expected = "user and assistant in turns, after an optional system"
        raise ValueError(f"messages: expected {expected}, got {', '.join(roles)}")
    texts = [text for _, text in turns]
    if head.strip():
        texts[0] = f"{head}\n\n{texts[0]}"
    *pairs, (prompt, response) = [texts[at : at + 2] for at in range(0, len(texts), 2)]
    earlier = [[user, thoughts.split(assistant)[1]] for user, assistant in pairs]  # as templates show them
    return prompt, earlier, response


def _turn(message: dict[str, Any]) -> tuple[str, str]:
    """Return role and text of a message, in the names of OpenAI or of ShareGPT."""
    role = message.get("role", message.get("from"))
    role = ROLES.get(str(role), role)
    if role in ("tool", "function") or message.get("tool_calls") or message.get("function_call"):
        raise ValueError("messages: tool calls are not supported; keep the user's and the assistant's texts")
    content = message.get("content")
    parts = content if isinstance(content, list) else []  # OpenAI's
    texts = [part["text"] for part in parts if isinstance(part, dict) and isinstance(part.get("text"), str)]
    if parts and len(texts) == len(parts):
        text = "".join(texts)
    else:
        text = text_field(message, "content" if "content" in message else "value")
    names = (*THOUGHTS, "reasoning")  # the last one is vLLM's
    thought = next((message[name] for name in names if isinstance(message.get(name), str)), "")
    return str(role), thoughts.tagged(thought) + text
