"""How plainly the code speaks: names that say what they hold, docstrings that begin with a noun, comments.

`python tests/words.py` prints the counts and ends with 1 if one is out of bounds; with -v it prints every
place.
"""

import ast
import io
import re
import sys
import tokenize
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
EMPTY = {
    "found", "made", "told", "asked", "wanted", "given", "own", "one", "whole", "there", "mine",
    "part", "parts", "drawn", "place", "before", "after", "known", "taken", "spent", "more", "some",
    "rest", "other", "others", "such", "usual", "what", "how", "which", "again", "upto", "held",
    "kept", "left", "said", "seen", "shown", "used", "real", "wider",
}  # fmt: skip
"""Names that say nothing of what they hold."""
MOST_EMPTY = 0.01
ODD_START = re.compile(r"(Of|What|How|That|So|Behind|Nor|By)\b")
COMMENTED = ("lora", "packing", "engines")
LEAST_COMMENTED = 0.05
"""Share of the lines of code with a comment, in the rooms that do arithmetic."""


def finds(path: Path) -> Iterator[tuple[str, str]]:
    """Yield all that is counted in a file: its kind, and where it is, or the name of a class."""
    text = path.read_text(encoding="utf-8")
    name = path.relative_to(ROOT)
    code = {number for number, line in enumerate(text.splitlines(), 1) if line.strip()}
    for node in ast.walk(ast.parse(text)):
        variable = node.arg if isinstance(node, ast.arg) else ""
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            variable = node.id
        if variable:
            yield "empty" if variable in EMPTY else "telling", f"{name}:{node.lineno}: {variable}"
        if isinstance(node, ast.ClassDef):
            yield "class", node.name
        documented = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Module)
        if documented and (doc := ast.get_docstring(node)):
            first, last = node.body[0].lineno, node.body[0].end_lineno or 0
            code -= set(range(first, last + 1))
            if ODD_START.match(doc):
                yield "odd", f"{name}:{first}: {doc.splitlines()[0]}"
    if name.parts[1] in COMMENTED:
        tokens = tokenize.generate_tokens(io.StringIO(text).readline)
        comments = [token for token in tokens if token.type == tokenize.COMMENT]
        code -= {c.start[0] for c in comments if c.line.lstrip().startswith("#")}
        yield from (("code", f"{name}:{number}") for number in code)
        yield from (
            ("comment", c.string) for c in comments if not re.search("type: ignore|noqa|fmt:", c.string)
        )


def main() -> int:
    found: dict[str, list[str]] = defaultdict(list)
    for room in ("stages", "lorapar_cli"):
        for path in sorted((ROOT / room).rglob("*.py")):
            for kind, place in finds(path):
                found[kind].append(place)
    empty, odd = found["empty"], found["odd"]
    twice = [f"class {name}" for name, number in Counter(found["class"]).items() if number > 1]
    if "-v" in sys.argv:
        print(*empty, *odd, *twice, sep="\n")
    names, comments = len(empty) + len(found["telling"]), len(found["comment"]) / len(found["code"])
    share = f"{len(empty) / names:.1%}, at most {MOST_EMPTY:.0%}"
    print(f"names without content: {len(empty)} of {names} ({share})")
    print(f"docstrings that begin with Of, What, How …: {len(odd)} (none)")
    print(f"class names that stand twice: {len(twice)} (none)")
    rooms = ", ".join(COMMENTED)
    print(f"lines with a comment in {rooms}: {comments:.1%} (at least {LEAST_COMMENTED:.0%})")
    return int(len(empty) > MOST_EMPTY * names or bool(odd or twice) or comments < LEAST_COMMENTED)


if __name__ == "__main__":
    sys.exit(main())
