"""The library: a folder for each stage, and the rooms below that several stages need."""

from pathlib import Path

ORDER = ("classify", "score", "partition", "sft", "rl", "eval")
"""Names of all stages, each after those whose artifacts it usually reads. `stages/NAME/` describes itself."""


def about(stage: str) -> str:
    """One line on a stage, the first of its folder's docstring, which is read without importing anything."""
    with (Path(__file__).parent / stage / "__init__.py").open(encoding="utf-8") as file:
        return file.readline().strip().strip('"')
