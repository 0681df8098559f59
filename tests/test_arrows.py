"""The plan of the house: every import points down, TYPE_CHECKING ones and names of modules in strings too."""

import ast
import re
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

from stages import ORDER

ROOT = Path(__file__).parent.parent
FLOORS = (  # from the ground up; a room may use those below it and itself
    ("errors", "registry", "progress", "records", "escaping"),
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


@cache
def imports(path: Path) -> list[list[str]]:
    """Every name below `stages` or `lorapar_cli` in a source file, in parts: stages, lora, adapter."""
    names: list[str] = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            names += (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Constant) and re.fullmatch(r"stages(\.\w+)+\.?", str(node.value)):
            names.append(str(node.value))
    return [parts for name in names if (parts := name.split("."))[0] in ("stages", "lorapar_cli")]


def place(path: Path) -> tuple[str, ...]:
    """The room of a source file, and what it is part of there."""
    return tuple(part.removesuffix(".py") for part in path.relative_to(ROOT / "stages").parts)


def test_arrows_point_down():
    upward = []
    for path in FILES:
        room = place(path)[0]
        for package, *names in imports(path) if room != "__init__" else ():
            other = names[0] if package == "stages" and names else ""
            down = other == room or other not in FLOOR or FLOOR[other] < max(FLOOR[room], 1)
            if package == "lorapar_cli" or not down:
                upward.append((str(path), package, *names))
    assert upward == []


def test_no_circles_within_a_room():
    below: dict[tuple[str, str], set[tuple[str, str]]] = {}
    for path in FILES:
        room, *parts = place(path)
        if parts and parts[0] != "__init__":
            named = {(room, n[2]) for n in imports(path) if n[1:2] == [room] and n[2:]}
            below.setdefault((room, parts[0]), set()).update(named)
    graph = {part: {other for other in named if other in below} - {part} for part, named in below.items()}
    TopologicalSorter(graph).prepare()  # CycleError names the circle


def test_few_files_know_a_stage_by_name():
    naming: dict[str, set[Path]] = {stage: set() for stage in ORDER}
    for path in (*FILES, *(ROOT / "lorapar_cli").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            stage = node.value if isinstance(node, ast.Constant) else None
            if stage in ORDER and ROOT / "stages" / stage not in path.parents:
                naming[stage].add(path)
    assert not {stage: paths for stage, paths in naming.items() if len(paths) > NAMED_IN}
