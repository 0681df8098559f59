"""Decides what counts as code in a model's text, for HumanEval and for the reward `code_tests`."""

import ast
import bisect
import re
import textwrap
from collections.abc import Iterator

from stages.prompts.answers import after_thought

STOP = ("\nclass ", "\ndef ", "\n#", "\nif ", "\nprint(", "\n@", "\nassert ", "\n```", "\nfrom ", "\nimport ")
"""Texts that end a function: the paper's and four more, which cannot be part of a function's body either."""

_FUTURE = re.compile(r"^from __future__ import [\w, ]+$", re.MULTILINE)


def code_of(output: str, prompt: str, entry: str, chat: bool) -> str | None:
    """The program in a model's answer to the beginning of a function, or None if there is nothing to run.

    A completion continues the prompt up to the first STOP text. An answer in a chat is cut to its code block;
    if the block does not define the function, it continues the prompt. Indentation is left as it is: wrong
    indentation is the model's mistake.
    """
    if not chat:
        ends = [at for stop in STOP if (at := output.find(stop)) >= 0]
        body = output[: min(ends)] if ends else output
        return "\n".join([prompt.rstrip(), body.removeprefix("\n"), ""]) if body.strip() else None
    code = code_block(output, entry)
    if not code.strip():
        return None
    future, code = _future(code)
    # The prompt goes first, so that a rewritten function can use what the prompt defines or imports.
    before = f"{stub(prompt)}\n" if _defines(code, entry) else f"{prompt.rstrip()}\n"
    return f"{future}{before}{code}\n"


def _future(code: str) -> tuple[str, str]:
    """The imports from `__future__`, which must come before all else, and the rest."""
    found = _FUTURE.findall(code)
    return "".join(f"{line}\n" for line in found), _FUTURE.sub("", code) if found else code


def stub(prompt: str) -> str:
    """The beginning of a function as a program that runs: with `pass`, if there is no docstring to end it.

    SyntaxError if it is no beginning of a program either.
    """
    text = f"{prompt.rstrip()}\n"
    if _parses(text):
        return text
    last = text.splitlines()[-1] if text.strip() else ""
    indent = last[: len(last) - len(last.lstrip())]
    found = [whole for more in ("", "    ") if _parses(whole := f"{text}{indent}{more}pass\n")]
    if not found:
        raise SyntaxError("the prompt is no beginning of a Python program")
    return found[0]


# A line that opens a block may name any language; within a line the fence opens Python or nothing.
_OPENS = re.compile(r"(?:^(?P<indent>[ \t]*)```[^\n`]*|```(?:[Pp]ython|py)?[ \t]*)\n", re.MULTILINE)
DOUBTS = 8
"""Blocks with a fence inside that are parsed to find their end; a text of thousands would take minutes."""
_CLOSES = re.compile(r"^([ \t]*)```[ \t]*$", re.MULTILINE)


def code_block(output: str, entry: str) -> str:
    """The last code block that defines the function `entry`, else the last one, else the whole text.

    A thought before it does not count. A block whose fence is indented, as in a list, loses that indentation.
    """
    output = after_thought(output)
    blocks = list(_blocks(output))
    with_entry = [block for block in blocks if _defines(block, entry)]
    return (with_entry or blocks or [output])[-1]


def _blocks(output: str) -> Iterator[str]:
    """What stands between fences.

    A block ends at the next fence that stands alone in its line and as far to the right as its own, so that
    one in a docstring does not end it. Without such a fence, or where only what stands before the first of
    any kind is a program, that first one ends it.
    """
    closing: dict[str, list[int]] = {}
    for found in _CLOSES.finditer(output):
        closing.setdefault(found[1], []).append(found.start())
    at = doubts = 0
    while opened := _OPENS.search(output, at):
        at = opened.end()
        line = output.rfind("\n", 0, opened.start()) + 1
        if opened["indent"] is None and output.count("```", line, opened.start()) % 2:
            continue  # it closes what began in this line
        indent = opened["indent"] or ""
        ends = closing.get(indent, [])
        later = bisect.bisect_left(ends, at)
        end = ends[later] if later < len(ends) else len(output)
        first = output.find("```", at, end)
        if first >= 0 and later < len(ends):
            doubts += 1
            whole, cut = (_outdented(output[at:stop], indent) for stop in (end, first))
            end = first if doubts <= DOUBTS and not _parses(whole) and _parses(cut) else end
        elif first >= 0:
            end = first
        block = _outdented(output[at:end], indent)
        # One that was opened behind a list's mark is indented as the list is.
        yield textwrap.dedent(block) if opened["indent"] is None and not _parses(block) else block
        at = end + 3


def _outdented(code: str, indent: str) -> str:
    return re.sub(f"^{indent}", "", code, flags=re.MULTILINE) if indent else code


def _parses(text: str) -> bool:
    try:
        ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True


def _defines(code: str, entry: str) -> bool:
    try:
        return any(isinstance(node, ast.FunctionDef) and node.name == entry for node in ast.parse(code).body)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return re.search(rf"^def {re.escape(entry)}\b", code, re.MULTILINE) is not None
