"""The plan of the house: every import points down, TYPE_CHECKING ones and names of modules in strings too."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from stages import ORDER

ROOT = Path(__file__).parent.parent
FLOORS = (  # from the ground up; a room may use those below it and itself
    ("errors", "registry", "progress", "records", "escaping", "own_functions"),
    ("runtime",),
    ("config", "store", "sandbox"),
    ("prompts",),
    ("rewards",),
    ("models", "data"),
    ("packing",),
    ("engines",),
    ("lora", "evaluation"),
    ("labelling",),
    ("pipeline",),
    ("plan",),
    ORDER,
    ("init", "sweep"),
    ("report",),
    ("gguf",),
    ("ask", "export", "serve"),
)
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}


def imports(text: str) -> Iterator[str]:
    """Every module below `stages` that a source file names: `stages.lora.adapter.adapter`."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Constant) and re.fullmatch(r"stages(\.\w+)+\.?", str(node.value)):
            yield str(node.value)


def upward(room: str, text: str) -> list[str]:
    """What a file in this room must not name."""
    found = []
    for name in imports(text):
        parts = name.split(".")
        if parts[0] == "lorapar_cli":
            found.append(name)
        if parts[0] == "stages" and len(parts) > 1 and parts[1] in FLOOR:  # else the package's own names
            other = parts[1]
            down = other == room or FLOOR[other] < FLOOR[room] or FLOOR[other] == FLOOR[room] == 0
            found += [] if down else [name]
    return found


@pytest.mark.parametrize(
    "path", sorted((ROOT / "stages").rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT))
)
def test_arrows_point_down(path: Path):
    room = path.relative_to(ROOT / "stages").parts[0].removesuffix(".py")
    if room != "__init__":
        assert upward(room, path.read_text(encoding="utf-8")) == []
