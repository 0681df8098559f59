"""Extracts the code from a model's text, for HumanEval and for the reward `code_tests`."""

import ast
import bisect
import re
import textwrap
from collections.abc import Iterator

from stages.prompts.thoughts import after_thought

STOP = ("\nclass ", "\ndef ", "\n#", "\nif ", "\nprint(", "\n@", "\nassert ", "\n```", "\nfrom ", "\nimport ")
"""Texts that end a function: the HumanEval paper's five, and five more that a function's body cannot have."""

_FUTURE_IMPORT = re.compile(r"^from __future__ import [\w, ]+$", re.MULTILINE)


def program_from_output(output: str, prompt: str, entry: str, chat: bool) -> str | None:
    """Return the program that a model's output makes of `prompt`, the beginning of the function `entry`.

    Without `chat`, the output continues the prompt and ends at the first STOP text. In a chat, the code block
    of the output counts; if it does not define `entry`, it continues the prompt. Indentation is left as it
    is: wrong indentation is the model's mistake. None if there is nothing to run.
    """
    if not chat:
        ends = [position for stop in STOP if (position := output.find(stop)) >= 0]
        body = output[: min(ends)] if ends else output
        return "\n".join([prompt.rstrip(), body.removeprefix("\n"), ""]) if body.strip() else None
    code = code_block(output, entry)
    if not code.strip():
        return None
    # Imports from `__future__` must come first in a program.
    future_imports = "".join(f"{line}\n" for line in _FUTURE_IMPORT.findall(code))
    code = _FUTURE_IMPORT.sub("", code)
    # The prompt goes first, so that a rewritten function can use what the prompt defines or imports.
    lead = f"{stub(prompt)}\n" if _defines(code, entry) else f"{prompt.rstrip()}\n"
    return f"{future_imports}{lead}{code}\n"


def stub(prompt: str) -> str:
    """Complete the beginning of a function to a program that runs, with `pass` where it has no body yet.

    SyntaxError if the prompt is not the beginning of a program.
    """
    text = f"{prompt.rstrip()}\n"
    if _tree(text):
        return text
    last_line = text.splitlines()[-1] if text.strip() else ""
    indent = last_line[: len(last_line) - len(last_line.lstrip())]
    for deeper in ("", "    "):  # after a comment in the body, and after `def f():`
        if _tree(program := f"{text}{indent}{deeper}pass\n"):
            return program
    raise SyntaxError("the prompt is not the beginning of a Python program")


# At the start of a line a fence may name any language; within a line only Python or nothing.
_OPENING_FENCE = re.compile(r"(?:^(?P<indent>[ \t]*)```[^\n`]*|```(?:[Pp]ython|py)?[ \t]*)\n", re.MULTILINE)
_CLOSING_FENCE = re.compile(r"^([ \t]*)```[ \t]*$", re.MULTILINE)
MAX_AMBIGUOUS = 8
"""Number of blocks with a fence inside that are parsed to find their end; thousands would take minutes."""


def code_block(output: str, entry: str) -> str:
    """Return the last code block that defines the function `entry`, else the last block, else the whole text.

    Blocks in a thought do not count. If the fences of a block are indented, as in a list, its lines lose that
    indentation.
    """
    output = after_thought(output)
    blocks = list(_blocks(output))
    with_entry = [block for block in blocks if _defines(block, entry)]
    return (with_entry or blocks or [output])[-1]


def _blocks(output: str) -> Iterator[str]:
    """Yield the text between the fences of each code block.

    A block ends at the next fence that is alone in its line and indented like the opening one, so that a
    fence in a docstring does not end it. It ends at the first fence of any kind instead if there is no such
    fence, or if only the text up to that first fence is a valid program.
    """
    fences: dict[str, list[int]] = {}  # indentation → positions of the fences that are alone in their lines
    for fence in _CLOSING_FENCE.finditer(output):
        fences.setdefault(fence[1], []).append(fence.start())
    position = ambiguous = 0
    while opening := _OPENING_FENCE.search(output, position):
        start = position = opening.end()
        within_line = opening["indent"] is None
        line_start = output.rfind("\n", 0, opening.start()) + 1
        if within_line and output.count("```", line_start, opening.start()) % 2:
            continue  # this fence closes code that was opened earlier in its line
        indent = opening["indent"] or ""
        ends = fences.get(indent, [])
        index = bisect.bisect_left(ends, start)
        closed = index < len(ends)
        end = ends[index] if closed else len(output)
        inner = output.find("```", start, end)  # the first fence of any kind
        if inner >= 0 and not closed:
            end = inner
        elif inner >= 0:
            ambiguous += 1
            long, short = (_unindent(output[start:stop], indent) for stop in (end, inner))
            if ambiguous <= MAX_AMBIGUOUS and not _tree(long) and _tree(short):
                end = inner
        block = _unindent(output[start:end], indent)
        # A block whose fence follows a list marker (`1. ```python`) is indented like the list item.
        yield textwrap.dedent(block) if within_line and not _tree(block) else block
        position = end + len("```")


def _unindent(code: str, indent: str) -> str:
    return re.sub(f"^{indent}", "", code, flags=re.MULTILINE) if indent else code


def _tree(text: str) -> ast.Module | None:
    """The parsed program; None if it is none."""
    try:
        return ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def _defines(code: str, entry: str) -> bool:
    if tree := _tree(code):
        return any(isinstance(node, ast.FunctionDef) and node.name == entry for node in tree.body)
    return re.search(rf"^def {re.escape(entry)}\b", code, re.MULTILINE) is not None
