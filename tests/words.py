"""How plainly the code speaks: names that say what they hold, docstrings that begin with a noun, comments.

`python tests/words.py` prints the counts and ends with 1 if one is out of bounds; with -v, or with files to
look at, it prints every place.
"""

import ast
import io
import re
import sys
import tokenize
from collections.abc import Iterator
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


def assigned(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Every variable that is assigned and every parameter, with its line."""
    for node in ast.walk(tree):
        if isinstance(node, ast.arg):
            yield node.arg, node.lineno
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id, node.lineno


def count(path: Path, counts: Counts) -> None:
    """Add one file to `counts`."""
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text)
    name = str(path.relative_to(ROOT))
    docstrings: set[int] = set()
    for variable, line in assigned(tree):
        counts.names += 1
        if variable in EMPTY:
            counts.empty.append(f"{name}:{line}: {variable}")
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            counts.classes.setdefault(node.name, []).append(f"{name}:{node.lineno}")
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Module):
            doc = ast.get_docstring(node)
            if doc:
                docstrings.update(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
                if ODD_START.match(doc):
                    line = getattr(node, "lineno", 1)
                    counts.odd.append(f"{name}:{line}: {doc.splitlines()[0]}")
    if path.relative_to(ROOT).parts[1] in COMMENTED:
        commented = {
            token.start[0]
            for token in tokenize.generate_tokens(io.StringIO(text).readline)
            if token.type == tokenize.COMMENT and not re.search(r"type: ignore|noqa|fmt:", token.string)
        }
        counts.comments += len(commented)
        counts.code += sum(
            bool(line.strip()) and number not in docstrings and not line.strip().startswith("#")
            for number, line in enumerate(text.splitlines(), 1)
        )


def main() -> int:
    chosen = [Path(argument).resolve() for argument in sys.argv[1:] if argument != "-v"]
    files = chosen or sorted(
        path for room in ("stages", "lorapar_cli") for path in (ROOT / room).rglob("*.py")
    )
    counts = Counts()
    for path in files:
        count(path, counts)
    twice = [
        f"class {name}: {', '.join(places)}" for name, places in counts.classes.items() if len(places) > 1
    ]
    if chosen or "-v" in sys.argv:
        print(*counts.empty, *counts.odd, *twice, sep="\n")
    empty, comments = len(counts.empty) / counts.names, counts.comments / max(counts.code, 1)
    share = f"{empty:.1%}, at most {MOST_EMPTY:.0%}"
    print(f"names without content: {len(counts.empty)} of {counts.names} ({share})")
    print(f"docstrings that begin with Of, What, How …: {len(counts.odd)} (none)")
    print(f"class names that stand twice: {len(twice)} (none)")
    if counts.code:
        names = ", ".join(COMMENTED)
        print(f"lines with a comment in {names}: {comments:.1%} (at least {LEAST_COMMENTED:.0%})")
    too_few = bool(counts.code) and comments < LEAST_COMMENTED
    return int(empty > MOST_EMPTY or bool(counts.odd) or bool(twice) or too_few)


if __name__ == "__main__":
    sys.exit(main())
