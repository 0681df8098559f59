"""Thoughts: what a model writes before its answer, between tags. Splits and hides them in texts.

The tags of a model that is asked are those of its chat template (`marks.py`), which a text that is read has
no more: there a thought stands between OPENING and CLOSING. Rows, and voters on a server, may have any tags.
"""

import re

OPENING, CLOSING = "<think>", "</think>"
_OPENING = (
    r"<(?:\w{1,20}:)?(?:\w{1,20}_)?think(?:ing)?(?::\w{1,20})?>|<thought>|\[THINK\]|◁think▷"
    r"|<\|START_THINKING\|>|<\|begin_of_thought\|>|<\|inner_prefix\|>|<\|channel>thought"
)
_CLOSING = (
    r"</(?:\w{1,20}:)?(?:\w{1,20}_)?think(?:ing)?(?::\w{1,20})?>|</thought>|\[/THINK\]|◁/think▷"
    r"|<\|END_THINKING\|>|<\|end_of_thought\|>|<\|inner_suffix\|>|<channel\|>"
)
OPENING_TAG, CLOSING_TAG = re.compile(_OPENING), re.compile(_CLOSING)
"""Tags as most models write them."""
_OPENED = re.compile(rf"(?:{_OPENING})\s*\Z")
_CLOSED = re.compile(rf"(?:(?:{_OPENING})\s*)?(?:{_CLOSING})\s*\Z")
# A tag that begins or ends a line; others may be mentioned by an answer.
_LEFT_OVER = re.compile(rf"(?:(?<=\n)|\A)(?:{_CLOSING})|(?:{_CLOSING})[ \t]*(?:\n|\Z)")


def closing_of(tag: str) -> str:
    """Return the tag that closes a thought: `</think>` for `<think>`, `<|END_THINKING|>` and so on."""
    for opening, closing in (("START_", "END_"), ("begin_", "end_"), ("prefix", "suffix")):
        if opening in tag:
            return tag.replace(opening, closing)
    return "<channel|>" if tag.startswith("<|channel>") else f"{tag[0]}/{tag[1:]}"


def after_thought(text: str) -> str:
    """Return what follows the last thought of a text; nothing if a thought is not closed.

    The tags are those that the text begins with, or OPENING and CLOSING: an answer may mention others.
    """
    begun = OPENING_TAG.match(text.lstrip())
    opening = begun[0] if begun else OPENING
    answer = text.rpartition(closing_of(opening))[2]
    return "" if opening in answer else answer


def split(text: str) -> tuple[str, str]:
    """Split a response into its thoughts and its answer.

    One that begins with no thought is all answer, unless it has the closing tag alone, as models write it
    whose prompt opens the thought.
    """
    thoughts, answer = [], text
    while opening := OPENING_TAG.match(answer.lstrip()):
        thought, closing, answer = answer.lstrip()[opening.end() :].partition(closing_of(opening[0]))
        if not closing:
            return "", text
        thoughts.append(thought.strip())
    if not thoughts and (end := _LEFT_OVER.search(text)):
        thoughts, answer = [text[: end.start()].strip()], text[end.end() :]
    return ("\n\n".join(filter(None, thoughts)), answer.lstrip()) if thoughts else ("", text)


def opened(prompt: str) -> str:
    """Return the tag, with the space after it, of a thought that a prompt ends in; else nothing."""
    match = _OPENED.search(prompt)
    return match[0] if match else ""


def closed(prompt: str) -> str:
    """Return the empty thought, or the end of a thought, that a prompt ends in; else nothing."""
    match = _CLOSED.search(prompt)
    return match[0] if match else ""


def tagged(thought: str) -> str:
    """Return a thought as it stands before an answer, between tags; nothing if there is none."""
    return f"{OPENING}\n{thought}\n{CLOSING}\n\n" if thought else ""
