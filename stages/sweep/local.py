"""Runs the steps of a sweep on this machine, as many at a time as there are slots."""

from __future__ import annotations

import multiprocessing
import signal
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

from stages.config import Config
from stages.pipeline.state import current_artifact
from stages.pipeline.steps import Step
from stages.store.artifacts import Store
from stages.sweep.graph import ArtifactId, Node

MakeStep = Callable[[Config, Step, list[str], Path], int]
"""Makes a step, with all output in this file, and returns the exit code that its command would have."""


@dataclass(frozen=True)
class Outcome:
    node: Node
    status: str
    """done, failed, or left out (an input failed)."""
    code: int | None = None
    """Exit code."""
    log: Path | None = None


def run(
    nodes: dict[ArtifactId, Node],
    slots: list[str | None],
    logs: Path,
    begin: Callable[[str | None], None],
    make_step: MakeStep,
    say: Callable[[str], None],
) -> list[Outcome]:
    """Make every step that is not current; nodes: in topological order. A failed step stops those that need it.

    slots: the CUDA_VISIBLE_DEVICES of each step that may run at a time. begin: sets up a worker process.
    """
    logs.mkdir(parents=True, exist_ok=True)
    done = {artifact for artifact, node in nodes.items() if node.current}
    waiting = [artifact for artifact in nodes if artifact not in done]
    ended: dict[ArtifactId, Outcome] = {}
    running: dict[Future[int], tuple[ArtifactId, int, float]] = {}
    pools: dict[int, ProcessPoolExecutor] = {}
    free = list(range(len(slots)))
    try:
        while waiting or running:
            for artifact in list(waiting):
                node = nodes[artifact]
                if any(needed in ended and needed not in done for needed in node.inputs):
                    waiting.remove(artifact)
                    ended[artifact] = Outcome(node, "left out")
                elif free and done.issuperset(node.inputs):
                    waiting.remove(artifact)
                    slot = free.pop()
                    if slot not in pools:
                        fresh = multiprocessing.get_context("spawn")  # no GPU survives a fork
                        pools[slot] = ProcessPoolExecutor(1, fresh, begin, (slots[slot],))
                    step = pools[slot].submit(
                        make_step, node.config, node.step, node.command, _log(logs, node)
                    )
                    running[step] = artifact, slot, time.monotonic()
                    say(f"started: {node.title}")
            for step in wait(running, return_when=FIRST_COMPLETED).done:
                artifact, slot, started = running.pop(step)
                free.append(slot)
                try:
                    code = step.result()
                except BrokenProcessPool:
                    code = 128 + signal.SIGKILL
                    del pools[slot]
                node, log = nodes[artifact], _log(logs, nodes[artifact])
                if code == 0 and current_artifact(Store(Path(node.id[0])), node.step):
                    done.add(artifact)
                    ended[artifact] = Outcome(node, "done", 0, log)
                    left = len(waiting) + len(running)
                    say(f"done in {time.monotonic() - started:.0f} s, {left} left: {node.title}")
                else:
                    ended[artifact] = Outcome(node, "failed", code, log)
                    say(f"failed with exit code {code}: {node.title}; see {log}")
    finally:
        if running:  # interrupted
            for worker in multiprocessing.active_children():
                worker.terminate()
        for pool in pools.values():
            pool.shutdown(cancel_futures=True)
    return list(ended.values())


def _log(logs: Path, node: Node) -> Path:
    return logs / f"{node.stage}-{node.step.key}.log"
