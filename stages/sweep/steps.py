"""The steps of a sweep: each artifact that cells need, once, made as soon as what it needs is there.

An executor makes the steps. `Workers` of workers.py are processes of this machine, which stay, one for each
slot of --jobs or --devices. With --slurm, `Cluster` of slurm.py runs `lorapar` in a job for each step,
at most --jobs or 1,024 at a time; at its time limit a job is queued again, and resumes.
"""

import json
import signal
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from stages.config import UNVOTED, Config
from stages.errors import first_line
from stages.pipeline.state import current_artifact
from stages.pipeline.steps import Step, with_inputs
from stages.store.artifacts import Store
from stages.sweep.table import Cell

ArtifactId = tuple[str, str, str]
"""Folder of the run, stage, cache key."""


@dataclass
class Node:
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
        shown = {column.step for column in cell.columns.values()}
        for step in with_inputs(cell.steps, shown).values():
            artifact, *inputs = ((str(root), s.stage.name, s.key) for s in (step, *step.inputs.values()))
            if artifact not in nodes:
                current = bool(current_artifact(store, step))
                command = _command(cell, step)
                nodes[artifact] = Node(cell.config, step, command, inputs, current=current)
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


class Executor(Protocol):
    poll_s: float
    """Seconds between two looks at the jobs."""

    @property
    def has_room(self) -> bool: ...

    def submit(self, node: Node, log: Path) -> Future[int]:
        """Begin to make a step, with all output in this file.

        The result, or that of another job with `done` and `result`, is the exit code, or an exception if the
        process ended without one.
        """
        ...

    def close(self, interrupted: bool) -> None:
        """End the workers; interrupted: and what is still being made."""
        ...


@dataclass(frozen=True)
class Outcome:
    node: Node
    status: str
    """done, failed, or left out (an input failed)."""
    code: int | None = None
    """Exit code."""
    log: Path | None = None


def run(
    nodes: dict[ArtifactId, Node], executor: Executor, logs: Path, say: Callable[[str], None]
) -> list[Outcome]:
    """Make every step that is not current. A failed step stops those that need it.

    nodes: in topological order.
    """
    logs.mkdir(parents=True, exist_ok=True)
    done = {artifact for artifact, node in nodes.items() if node.current}
    waiting = [artifact for artifact in nodes if artifact not in done]
    ended: dict[ArtifactId, Outcome] = {}
    running: dict[ArtifactId, tuple[Future[int], Path, float]] = {}
    try:
        while waiting or running:
            for artifact in list(waiting):
                node = nodes[artifact]
                if any(needed in ended and needed not in done for needed in node.inputs):
                    waiting.remove(artifact)
                    ended[artifact] = Outcome(node, "left out")
                elif executor.has_room and done.issuperset(node.inputs):
                    waiting.remove(artifact)
                    log = logs / f"{node.stage}-{node.step.key}.log"
                    running[artifact] = executor.submit(node, log), log, time.monotonic()
                    say(f"started: {node.title}")
            for artifact, (job, log, started) in list(running.items()):
                if not job.done():
                    continue
                del running[artifact]
                ended[artifact] = outcome = _outcome(job, nodes[artifact], log, say)
                if outcome.status == "done":
                    done.add(artifact)
                    left = len(waiting) + len(running)
                    seconds = time.monotonic() - started
                    say(f"done in {seconds:.0f} s, {left} left: {outcome.node.title}")
            time.sleep(executor.poll_s if running else 0)
    finally:
        executor.close(interrupted=bool(running))
    return list(ended.values())


def _outcome(job: Future[int], node: Node, log: Path, say: Callable[[str], None]) -> Outcome:
    """Outcome of a job that ended: a step is done if its artifact is there, whatever its process says."""
    try:
        code = job.result()
    except Exception as error:  # of the worker's process, or of the cluster
        code = 128 + signal.SIGKILL
        say(f"{node.title}: {first_line(error)}")
    if code == 0 and current_artifact(Store(node.config.root), node.step):
        return Outcome(node, "done", 0, log)
    say(f"failed with exit code {code}: {node.title}; see {log}")
    return Outcome(node, "failed", code, log)
