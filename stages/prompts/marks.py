"""Marks of a chat template around thoughts, read off conversations that it renders: no list of models.

Rows, the limits of thoughts and the reading of completions all go by these marks.
"""

import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from stages.errors import ConfigError
from stages.prompts.thoughts import CLOSING, CLOSING_TAG, OPENING, OPENING_TAG, closed, closing_of, opened

THOUGHT, ANSWER = "@thought@", "@answer@"


@dataclass(frozen=True)
class Marks:
    opening: str
    """What stands between a prompt and a thought; nothing if the prompt opens the thought."""
    closing: str
    """What stands between a thought and its answer."""
    silent: str = ""
    """What stands between a prompt and an answer without a thought."""
    opens: bool = False
    """Whether the prompt opens a thought."""
    closes: bool = False
    """Whether the prompt says that there is no thought, so that no row has one."""
    shows: bool = False
    """Whether the template itself writes the thought of a conversation's last answer."""
    tag: str = ""
    """What opens a thought, in the prompt or after it, if it is known."""
    known: bool = True
    """Whether the template says how a thought begins; if not, the tags are those of most models."""
    form: int = 0
    """Form of the message whose thought the template writes; see `message`."""

    @property
    def thinks(self) -> bool:
        """Whether answers of the model begin with a thought, which may be empty."""
        return self.opens or bool(self.closing.strip() and self.end in self.silent)

    def head(self, thought: str) -> str:
        """Return the text between a prompt and an answer."""
        has_thought = self.opens or (thought and not self.closes)
        return f"{self.opening}{thought}{self.closing}" if has_thought else self.silent

    @property
    def end(self) -> str:
        """The text that tells that a thought has ended: a tag, if there is one."""
        tag = CLOSING_TAG.search(self.closing)
        return tag[0] if tag else self.closing.strip()

    def read(self, completion: str) -> str:
        """Return a completion with OPENING and CLOSING in place of the template's own tags."""
        text, silent = completion.replace(self.end, CLOSING), self.silent.strip()
        if silent and self.end not in silent:  # an answer's own tag is no part of it
            text = text.replace(CLOSING + silent, CLOSING)
            text = text.lstrip().removeprefix(silent) if text.lstrip().startswith(silent) else text
        return text.replace(self.tag, OPENING) if self.tag else text


def message(response: str, thought: str, form: int = 0) -> dict[str, Any]:
    """A message. Templates disagree on the field of a thought, or take it as a part of the content."""
    if not thought:
        return {"role": "assistant", "content": response}
    fields = dict.fromkeys(("reasoning_content", "reasoning", "thinking"), thought)
    mistral = [{"type": "thinking", "thinking": thought}, {"type": "text", "text": response}]
    apertus = {"blocks": [{"type": "thoughts", "text": thought}, {"type": "response", "text": response}]}
    content = (response, mistral, apertus)[form]
    return {"role": "assistant", "content": content, **({} if form else fields)}


def marks_of(prompt: str, tell: Callable[[dict[str, Any]], str], source: str, default: Marks | None) -> Marks:
    """Read the marks off two conversations, with a thought and without.

    prompt: of a question. tell: renders the conversation in which a message answers it. source: the
    template's. default: its marks without arguments.
    """
    silent_text, writes = tell(message(ANSWER, "")), False
    for form in range(3):
        with suppress(ConfigError):  # a template may not take a content of parts
            lead, _, tail = tell(message(ANSWER, THOUGHT, form)).partition(THOUGHT)
            between, answer, _ = tail.partition(ANSWER)
            # One that prints whatever the content is shows its fields, too.
            if writes := bool(answer and between.strip() and "type" not in between):
                break
    begins = writes and lead.startswith(prompt)
    tag, ended, empty = opened(prompt), closed(prompt), "" if begins else _empty(prompt, default)
    bases = (mark for mark in ("", tag, ended, empty) if silent_text.startswith(prompt.removesuffix(mark)))
    left_out = next(bases, None)  # by the conversation, of the prompt
    silent = "" if left_out is None else silent_text[len(prompt) - len(left_out) :].partition(ANSWER)[0]
    if begins or (writes and tag):
        marks = Marks(lead[len(prompt) :] if begins else "", between, silent, shows=True, form=form)
    elif default and (empty or (default.shows and not writes)):
        return replace(default, silent=silent, opens=False, closes=True)
    elif (closing := CLOSING_TAG.search(silent)) and not (ended and left_out):
        marks = _inside(silent, closing)
    else:
        marks = around(tag, source, "" if closing else silent)
    opens = bool(tag) or (writes and not marks.opening.strip())
    return replace(marks, opens=opens, closes=bool(ended), tag=marks.opening.strip() or tag.strip())


def _empty(prompt: str, default: Marks | None) -> str:
    """The empty thought that a prompt ends in, in marks of the template's own; else nothing."""
    if default and default.shows and default.opening.strip():
        for length in range(len(default.closing), 0, -1):
            if prompt.endswith(empty := default.opening + default.closing[:length]):
                return empty
    return ""


def _inside(silent: str, closing: re.Match[str]) -> Marks:
    """Marks that put a thought into the empty one that stands before each answer."""
    tag = OPENING_TAG.search(silent[: closing.start()])
    start = tag.end() if tag else 0
    middle = (start + closing.start()) // 2
    return Marks(silent[:middle], silent[middle:], silent)


def around(tag: str, source: str, silent: str) -> Marks:
    """Marks of a template that leaves thoughts out, by the tag that a prompt opens, or its source has."""
    written = OPENING_TAG.search(source)
    name = tag.rstrip() or (written[0] if written else OPENING)
    # A tag in a line of its own is closed in one. One that a value follows at once is not.
    in_line = tag != name if tag else not re.search(rf"{re.escape(name)}['\"]?\s*(?:\+|~|}}}}|{{{{)", source)
    line = "\n" if in_line else ""
    space = "" if name.startswith("<|") else 2 * line
    opening = "" if tag else f"{name}{line}"
    closing = f"{line}{closing_of(name)}{space}{silent}"
    return Marks(opening, closing, silent, known=bool(tag or written))
