"""The plan of the house: every import points down, TYPE_CHECKING ones and names of modules in strings too."""

import ast
import re
from collections.abc import Iterator
from graphlib import TopologicalSorter
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
    ("ask", "export", "serve"),
)
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}


FILES = sorted((ROOT / "stages").rglob("*.py"))
NAMED_IN = 8
"""Most files outside of a stage's folder that have its name as a string: as a value of settings, mostly."""


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


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_arrows_point_down(path: Path):
    room = path.relative_to(ROOT / "stages").parts[0].removesuffix(".py")
    if room != "__init__":
        assert upward(room, path.read_text(encoding="utf-8")) == []


def modules_below(room: str) -> dict[str, set[str]]:
    """Each folder or file of a room, and which others of the room it names."""
    parts = {path.name.removesuffix(".py") for path in (ROOT / "stages" / room).iterdir()} - {"__init__"}
    named: dict[str, set[str]] = {part: set() for part in parts}
    for path in (ROOT / "stages" / room).rglob("*.py"):
        part = path.relative_to(ROOT / "stages" / room).parts[0].removesuffix(".py")
        if part in parts:
            names = [name.split(".") for name in imports(path.read_text(encoding="utf-8"))]
            named[part] |= {n[2] for n in names if n[:2] == ["stages", room] and n[2:] and n[2] in parts}
    return {part: others - {part} for part, others in named.items()}


@pytest.mark.parametrize("room", [path.parent.name for path in (ROOT / "stages").glob("*/__init__.py")])
def test_no_circles_within_a_room(room: str):
    TopologicalSorter(modules_below(room)).prepare()  # CycleError names the circle


def test_few_files_know_a_stage_by_name():
    naming: dict[str, set[Path]] = {stage: set() for stage in ORDER}
    for path in (*FILES, *(ROOT / "lorapar_cli").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            stage = node.value if isinstance(node, ast.Constant) else None
            if stage in ORDER and ROOT / "stages" / stage not in path.parents:
                naming[stage].add(path)
    assert not {stage: paths for stage, paths in naming.items() if len(paths) > NAMED_IN}
