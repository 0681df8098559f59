"""`lorapar --help`, read from the sources as text: to import all commands would take four times as long."""

import re
import textwrap
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).parent
WIDTH = 100


def text() -> str:
    """The usage, and every command with the first paragraph of its help."""
    app = (HERE / "app.py").read_text(encoding="utf-8")
    (about,) = re.findall(r'^    help="(.*)",$', app, re.MULTILINE)
    lines = ["Usage: lorapar COMMAND …   (lorapar COMMAND --help says more)", "", about, "", "Commands:"]
    for name, told in commands():
        head = f"  {name:<11}"
        lines += textwrap.wrap(told, WIDTH, initial_indent=head, subsequent_indent=" " * len(head))
    return "\n".join(lines)


def commands() -> Iterator[tuple[str, str]]:
    """Each command in order with its help: the stages of the table, and what app.py adds to them."""
    table = (HERE.parent / "stages/pipeline/stages.py").read_text(encoding="utf-8")
    yield from re.findall(r'^ +name="(\w+)",\n +help="(.*)",$', table, re.MULTILINE)
    app = (HERE / "app.py").read_text(encoding="utf-8")
    for name in re.findall(r"^@app\.command\(\)\ndef (\w+)\(", app, re.MULTILINE):
        yield name, _told(app, name)
    (names,) = re.findall(r"^COMMANDS = \((.*?)^\)", app, re.MULTILINE | re.DOTALL)
    for name in re.findall(r'"([\w-]+)"', names):
        source = (HERE / f"{name.replace('-', '_')}.py").read_text(encoding="utf-8")
        yield name, _told(source, "command")


def _told(source: str, function: str) -> str:
    """The first paragraph of a function's docstring."""
    _, _, body = source.partition(f"\ndef {function}(")
    return " ".join(body.split('"""')[1].split("\n\n")[0].split())
