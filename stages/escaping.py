"""Makes texts of users harmless where they are shown: one function for each target.

Names of rows and files, questions, answers and messages may hold anything: markup, control characters that a
terminal obeys, formulas that a spreadsheet computes, line breaks that end a table. Pages in HTML need no
function: their templates escape every text.
"""

import re
import shlex

_LINE_BREAKS = re.compile(r"[\n\r\v\f\x1c-\x1e\x85\u2028\u2029]+")
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff]")
"""Control characters but tab and line feed, and those that change the direction of text."""
_MARKDOWN = re.compile(r"[\\`*\[\]<>|&#~$]|(?<![^\W_])_|_(?![^\W_])")
"""Characters that begin markup anywhere; an underscore between letters does not."""
_MARKDOWN_START = re.compile(r"^(\d*)((?<=\d)[.)](?=\s|$)|[-+](?=\s|$)|-(?=[-\s]*$)|=(?==*$))")
"""Characters that begin a list, or draw a line, at the start of a paragraph."""
_FORMULA = ("=", "+", "-", "@", "\t", "\r")


def terminal(text: str) -> str:
    r"""Show control characters as `\x1b`; line feeds and tabs stay."""
    return _CONTROLS.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def one_line(text: str) -> str:
    """Replace line breaks by spaces and show control characters: for comments of YAML, headings."""
    return terminal(_LINE_BREAKS.sub(" ", text)).strip()


def markdown(text: str) -> str:
    """Escape a text for a heading, a paragraph or a cell of a table; line breaks become spaces."""
    return _MARKDOWN_START.sub(r"\1\\\2", _MARKDOWN.sub(r"\\\g<0>", one_line(text)))


def csv_cell(text: str) -> str:
    """Put an apostrophe before what a spreadsheet would compute."""
    return f"'{text}" if text.lstrip(" ").startswith(_FORMULA) else text


def shell(argument: str) -> str:
    """Quote an argument for the shell, in one line: bash reads the escapes of control characters."""
    if _CONTROLS.search(argument) or "\n" in argument or "\t" in argument:
        escaped = argument.replace("\\", "\\\\").replace("'", "\\'")
        return f"$'{''.join(_shell_escape(c) for c in escaped)}'"
    return shlex.quote(argument)


def _shell_escape(character: str) -> str:
    if character in "\n\t" or _CONTROLS.match(character):
        number = ord(character)
        return f"\\x{number:02x}" if number < 0x80 else f"\\u{number:04x}"  # bash takes \x for a byte
    return character
