"""How plainly the code speaks: names that say what they hold, docstrings that begin with a noun, comments.

`python tests/words.py` prints the counts and ends with 1 if one is out of bounds; with -v it prints every
place.
"""

import ast
import io
import re
import sys
import tokenize
from dataclasses import dataclass, field
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


@dataclass
class Counts:
    names: int = 0
    empty: list[str] = field(default_factory=list)
    odd: list[str] = field(default_factory=list)
    classes: dict[str, list[str]] = field(default_factory=dict)
    comments: int = 0
    code: int = 0


def count(path: Path, counts: Counts) -> None:
    """Add one file to `counts`."""
    text = path.read_text(encoding="utf-8")
    name = str(path.relative_to(ROOT))
    code = {number for number, line in enumerate(text.splitlines(), 1) if line.strip()}
    for node in ast.walk(ast.parse(text)):
        variable = node.arg if isinstance(node, ast.arg) else ""
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            variable = node.id
        counts.names += bool(variable)
        if variable in EMPTY:
            counts.empty.append(f"{name}:{node.lineno}: {variable}")
        if isinstance(node, ast.ClassDef):
            counts.classes.setdefault(node.name, []).append(f"{name}:{node.lineno}")
        documented = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Module)
        if documented and (doc := ast.get_docstring(node)):
            first, last = node.body[0].lineno, node.body[0].end_lineno or 0
            code -= set(range(first, last + 1))
            if ODD_START.match(doc):
                counts.odd.append(f"{name}:{first}: {doc.splitlines()[0]}")
    if path.relative_to(ROOT).parts[1] in COMMENTED:
        tokens = tokenize.generate_tokens(io.StringIO(text).readline)
        comments = [token for token in tokens if token.type == tokenize.COMMENT]
        counts.code += len(code - {c.start[0] for c in comments if c.line.lstrip().startswith("#")})
        counts.comments += sum(not re.search(r"type: ignore|noqa|fmt:", c.string) for c in comments)


def main() -> int:
    counts = Counts()
    for room in ("stages", "lorapar_cli"):
        for path in sorted((ROOT / room).rglob("*.py")):
            count(path, counts)
    twice = [f"class {name}: {', '.join(at)}" for name, at in counts.classes.items() if len(at) > 1]
    if "-v" in sys.argv:
        print(*counts.empty, *counts.odd, *twice, sep="\n")
    empty, comments = len(counts.empty) / counts.names, counts.comments / counts.code
    share = f"{empty:.1%}, at most {MOST_EMPTY:.0%}"
    print(f"names without content: {len(counts.empty)} of {counts.names} ({share})")
    print(f"docstrings that begin with Of, What, How …: {len(counts.odd)} (none)")
    print(f"class names that stand twice: {len(twice)} (none)")
    rooms = ", ".join(COMMENTED)
    print(f"lines with a comment in {rooms}: {comments:.1%} (at least {LEAST_COMMENTED:.0%})")
    return int(empty > MOST_EMPTY or bool(counts.odd) or bool(twice) or comments < LEAST_COMMENTED)


if __name__ == "__main__":
    sys.exit(main())
