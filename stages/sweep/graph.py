"""The union of all steps that the cells of a table need, each once."""

from __future__ import annotations

import json
import statistics
from dataclasses import dataclass, field
from pathlib import Path

from stages.pipeline.state import state
from stages.pipeline.steps import Step
from stages.store.artifacts import Store
from stages.sweep.table import Cell

Place = tuple[str, str, str]
"""Folder of the run, stage, key."""
PLANNED = "LORAPAR_PLANNED"
"""Environment variable with the key that a step is to make: a config may change while the step waits."""


@dataclass
class Node:
    """One artifact that is to be there in the end."""

    place: Place
    step: Step
    command: list[str]
    """Arguments of `lorapar` that make it, and nothing else."""
    inputs: list[Place]
    cells: list[tuple[str, str, int]] = field(default_factory=list)
    """Table, row and seed of the cells that need it."""
    current: bool = False

    @property
    def stage(self) -> str:
        return self.step.stage.name

    @property
    def title(self) -> str:
        _, row, seed = self.cells[0]
        more = f" and {len(self.cells) - 1} more" if len(self.cells) > 1 else ""
        return f"{self.step.name} {self.step.key} for {row!r}, seed {seed}{more}"


def build_graph(cells: list[Cell]) -> dict[Place, Node]:
    """The steps of all columns and what they are made from, each after its inputs."""
    nodes: dict[Place, Node] = {}
    stores: dict[Path, Store] = {}

    def add(cell: Cell, step: Step) -> Place:
        place = (str(cell.config.root), step.stage.name, step.key)
        inputs = [add(cell, upstream) for upstream in step.inputs.values()]
        if place not in nodes:
            nodes[place] = Node(place, step, _command(cell, step), inputs)
            store = stores.setdefault(cell.config.root, Store(cell.config.root))
            nodes[place].current = state(store, step).state == "current"
        if (name := (cell.table, cell.row, cell.seed)) not in nodes[place].cells:
            nodes[place].cells.append(name)
        return place

    for cell in cells:
        for column in cell.columns.values():
            for name in column.steps:
                add(cell, cell.steps[name])
    return nodes


def _command(cell: Cell, step: Step) -> list[str]:
    sets = [part for text in cell.overrides for part in ("--set", text)]
    command = [step.stage.name, str(cell.base), *sets]
    if step.stage.name == "eval":
        target, _, benchmark = step.variant.partition("@")
        # `auto` is another engine where there is another device, on a cluster's login node for one.
        sets = ["--set", f"eval.targets=[{target}]", "--set", f"eval.engine={cell.config.eval.engine}"]
        return [*command, *sets, "--benchmark", benchmark]
    return [*command, "--only", step.title] if len(step.stage.variants(cell.config)) > 1 else command


def measured(nodes: dict[Place, Node]) -> dict[str, float]:
    """Stage → mean seconds that its artifacts in these runs took."""
    seconds: dict[str, list[float]] = {}
    for root in {Path(place[0]) for place in nodes}:
        for manifest in root.glob("*/*/manifest.json"):
            try:
                found = json.loads(manifest.read_text(encoding="utf-8"))
                if manifest.parent.name != found["key"]:
                    continue  # a link to the latest one, or an earlier one
                seconds.setdefault(found["stage"], []).append(float(found["provenance"]["seconds"]))
            except (OSError, ValueError, KeyError, TypeError):
                continue  # what is damaged tells no time
    return {stage: statistics.fmean(values) for stage, values in seconds.items()}
