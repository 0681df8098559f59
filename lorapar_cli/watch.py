"""Shows the progress of a sweep: a view that is updated in place on a terminal, else only its messages."""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from lorapar_cli import terminal
from stages.sweep.graph import ArtifactId
from stages.sweep.local import Sweep

TAIL = 4000
"""Bytes at the end of a log in which its last lines are looked for."""


def state_of_cells(sweep: Sweep, seconds: dict[str, float]) -> str:
    """Return the number of cells in each state, and about how long the sweep still takes.

    seconds: stage → seconds per step, for stages that have been measured.
    """
    needed: dict[tuple[str, str, int], list[ArtifactId]] = {}
    for artifact, node in sweep.nodes.items():
        for cell in node.cells:
            needed.setdefault(cell, []).append(artifact)
    failed = {artifact for artifact, outcome in sweep.ended.items() if outcome.status != "done"}
    counts = {"done": 0, "failed": 0, "running": 0, "waiting": 0}
    for artifacts in needed.values():
        if failed.intersection(artifacts):
            counts["failed"] += 1
        elif sweep.done.issuperset(artifacts):
            counts["done"] += 1
        else:
            counts["running" if sweep.running.keys() & artifacts else "waiting"] += 1
    cells = ", ".join(f"{number} {status}" for status, number in counts.items() if number)
    remaining = time_left(sweep, seconds)
    return f"cells: {cells}" + ("" if remaining is None else f"; about {terminal.duration(remaining)} left")


def time_left(sweep: Sweep, seconds: dict[str, float]) -> float | None:
    """Estimate the remaining seconds, assuming that all slots stay busy.

    None if a stage with remaining steps has never been measured.
    """
    done = [outcome for outcome in sweep.ended.values() if outcome.status == "done"]
    per_step = {outcome.node.stage: outcome.seconds for outcome in reversed(done)} | seconds
    elapsed = {artifact: time.monotonic() - step.started for artifact, step in sweep.running.items()}
    elapsed |= dict.fromkeys(sweep.waiting, 0.0)
    stages = {artifact: sweep.nodes[artifact].stage for artifact in elapsed}
    if not per_step.keys() >= set(stages.values()):
        return None
    work = sum(max(0.0, per_step[stages[artifact]] - so_far) for artifact, so_far in elapsed.items())
    return work / max(1, len(sweep.slots) + len(sweep.running))  # free and used slots


class LiveView:
    """Terminal view of running steps, each with the last line of its log, and the summary."""

    def __init__(self, seconds: dict[str, float]) -> None:
        from rich.console import Console
        from rich.live import Live

        self.seconds = seconds
        self.console = Console(stderr=True)
        self.live = Live(console=self.console, transient=True, auto_refresh=False)
        self.updated = 0.0

    def say(self, text: str) -> None:
        with self._unless_gone():
            self.console.print(text, markup=False, highlight=False)

    @contextmanager
    def _unless_gone(self) -> Iterator[None]:
        """Context in which a terminal that was closed ends the view, and not the steps."""
        try:
            yield
        except OSError:
            self.console.quiet = True

    def update(self, sweep: Sweep) -> None:
        """Redraw the view, at most once a second."""
        if time.monotonic() - self.updated >= 1:
            self.updated = time.monotonic()
            with self._unless_gone():
                self.live.update(self.render(sweep), refresh=True)

    def render(self, sweep: Sweep) -> Any:
        from rich.text import Text

        lines = []
        for artifact, step in sweep.running.items():
            node = sweep.nodes[artifact]
            elapsed = terminal.duration(time.monotonic() - step.started)
            device = "" if step.worker.device is None else f", device {step.worker.device}"
            lines.append(f"{node.title} ({elapsed}{device})\n  {last_line(sweep.log(node))}")
        lines.append(state_of_cells(sweep, self.seconds))
        return Text("\n".join(lines), no_wrap=True, overflow="ellipsis")


def last_line(path: Path) -> str:
    """Return the last line of a log that is not blank; empty if there is none, or no log yet."""
    return next(_reversed_lines(path), "")


def last_error(path: Path, offset: int) -> str:
    """Return the last `error:` line of a log, or else its last line.

    offset: byte at which the last try begins.
    """
    lines = list(_reversed_lines(path, offset))
    errors = (line.removeprefix("error: ") for line in lines if line.startswith("error: "))
    return next(errors, next(iter(lines), "no output"))


def _reversed_lines(path: Path, offset: int = 0) -> Iterator[str]:
    """Yield the non-blank lines in the last TAIL bytes of a log after `offset`, the last one first."""
    try:
        with path.open("rb") as file:
            file.seek(max(offset, path.stat().st_size - TAIL))
            lines = file.read().decode(errors="replace").split("\n")
    except OSError:
        return
    yield from (line for line in reversed(lines) if line.strip())


def sweep_view(
    interactive: bool, seconds: dict[str, float]
) -> tuple[AbstractContextManager[Any], Callable[[str], None], Callable[[Sweep], None]]:
    """Return the context in which a sweep runs, and its `say` and `on_poll` callbacks."""
    if not interactive:
        return nullcontext(), terminal.say, lambda sweep: None
    view = LiveView(seconds)
    return view.live, view.say, view.update
