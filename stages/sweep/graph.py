"""The graph of all artifacts that the cells of a table need, each once."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

from stages.config import UNVOTED, Config
from stages.pipeline.state import current_artifact
from stages.pipeline.steps import Step, with_inputs
from stages.store.artifacts import Store
from stages.sweep.table import Cell

ArtifactId = tuple[str, str, str]
"""Folder of the run, stage, cache key."""


@dataclass
class Node:
    id: ArtifactId
    config: Config
    step: Step
    command: list[str]
    """Arguments of `lorapar` that make this artifact only."""
    inputs: list[ArtifactId]
    cells: list[tuple[str, str, int]] = field(default_factory=list)
    """Table, row and seed of each cell that needs it."""
    current: bool = False
    """True if the artifact existed and was up to date when the graph was built."""

    @property
    def stage(self) -> str:
        return self.step.stage.name

    @property
    def title(self) -> str:
        _, row, seed = self.cells[0]
        suffix = f" and {len(self.cells) - 1} more" if len(self.cells) > 1 else ""
        return f"{self.step.name} {self.step.key} for {row!r}, seed {seed}{suffix}"


def build_graph(cells: list[Cell]) -> dict[ArtifactId, Node]:
    """Return the artifacts of all columns and their inputs, in topological order."""
    nodes: dict[ArtifactId, Node] = {}
    stores: dict[Path, Store] = {}

    for cell in cells:
        root = cell.config.root
        store = stores.setdefault(root, Store(root))
        shown = {name for column in cell.columns.values() for name in column.steps}
        for step in with_inputs(cell.steps, shown).values():
            artifact, *inputs = ((str(root), s.stage.name, s.key) for s in (step, *step.inputs.values()))
            if artifact not in nodes:
                current = bool(current_artifact(store, step))
                command = _command(cell, step)
                nodes[artifact] = Node(artifact, cell.config, step, command, inputs, current=current)
            nodes[artifact].cells.append((cell.table, cell.row, cell.seed))
    return nodes


def _command(cell: Cell, step: Step) -> list[str]:
    # Engines are resolved here, because `auto` may give another one where the step runs: a node has a GPU,
    # the login node that plans the sweep has none.
    engines = [f"eval.engine={cell.config.eval.engine}"]
    if cell.config.classify.strategy not in UNVOTED:
        voters = [v.model_dump(mode="json", exclude_unset=True) for v in cell.config.classify.voters]
        engines.append(f"classify.voters={json.dumps(voters, ensure_ascii=False)}")
    sets = [argument for text in (*cell.overrides, *engines) for argument in ("--set", text)]
    command = [step.stage.name, str(cell.base), *sets]
    if step.stage.name == "eval":
        target = step.variant.partition("@")[0]
        return [*command, "--set", f"eval.targets=[{target}]", "--only", step.variant]
    others = [other for other in cell.steps.values() if other.stage is step.stage]
    return [*command, "--only", step.title] if len(others) > 1 else command
