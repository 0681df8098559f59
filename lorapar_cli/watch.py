"""A sweep at a glance: one view that is rewritten on a terminal. Elsewhere its lines are all there is."""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from lorapar_cli import terminal
from stages.sweep.graph import Place
from stages.sweep.local import Sweep

TAIL = 4000
"""Bytes at the end of a step's log in which its last lines are looked for."""


def summary(sweep: Sweep, seconds: dict[str, float]) -> str:
    """Cells done, running, failed and left, and about how long the rest takes.

    seconds: stage → what a step of it takes, as far as it is known.
    """
    cells: dict[tuple[str, str, int], list[Place]] = {}
    for place, node in sweep.nodes.items():
        for cell in node.cells:
            cells.setdefault(cell, []).append(place)
    failed = {place for place, outcome in sweep.ended.items() if outcome.how != "done"}
    counts = {"done": 0, "failed": 0, "running": 0, "waiting": 0}
    for needed in cells.values():
        if failed.intersection(needed):
            counts["failed"] += 1
        elif sweep.done.issuperset(needed):
            counts["done"] += 1
        else:
            counts["running" if sweep.running.keys() & needed else "waiting"] += 1
    told = ", ".join(f"{number} {how}" for how, number in counts.items() if number)
    left = time_left(sweep, seconds)
    return f"cells: {told}" + (f"; about {terminal.duration(left)} left" if left is not None else "")


def time_left(sweep: Sweep, seconds: dict[str, float]) -> float | None:
    """Seconds, if all places stay busy; None while a stage that is left has never been measured."""
    known = dict(seconds)
    for outcome in sweep.ended.values():
        if outcome.how == "done":
            known.setdefault(outcome.node.stage, outcome.seconds)
    waiting = [sweep.nodes[place].stage for place in sweep.waiting]
    running = [
        (sweep.nodes[place].stage, time.monotonic() - begun) for place, (_, _, begun) in sweep.running.items()
    ]
    if any(stage not in known for stage in [*waiting, *(stage for stage, _ in running)]):
        return None
    rest = sum(known[stage] for stage in waiting)
    rest += sum(max(0.0, known[stage] - spent) for stage, spent in running)
    return rest / max(1, len(sweep.places) + len(sweep.running))


class LiveView:
    """The view on a terminal: running steps with the last line of their logs, and the summary."""

    def __init__(self, seconds: dict[str, float]) -> None:
        from rich.console import Console
        from rich.live import Live

        self.seconds = seconds
        self.console = Console(stderr=True)
        self.live = Live(console=self.console, transient=True, auto_refresh=False)
        self.shown = 0.0

    def say(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False)

    def look(self, sweep: Sweep) -> None:
        """Draw the view again, once a second."""
        if time.monotonic() - self.shown >= 1:
            self.shown = time.monotonic()
            self.live.update(self.drawn(sweep), refresh=True)

    def drawn(self, sweep: Sweep) -> Any:
        from rich.text import Text

        lines = []
        for place, (_, device, begun) in sweep.running.items():
            node = sweep.nodes[place]
            spent = terminal.duration(time.monotonic() - begun)
            where = "" if device is None else f", device {device}"
            lines.append(f"{node.title} ({spent}{where})\n  {last_line(sweep.log(node))}")
        return Text("\n".join([*lines, summary(sweep, self.seconds)]), no_wrap=True, overflow="ellipsis")


def last_line(path: Path) -> str:
    """Of a log, which may not be there yet."""
    return next(_from_the_end(path), "")


def last_error(path: Path, begins: int) -> str:
    """The last line of a log that is an error of ours, or else its last line.

    begins: bytes of earlier tries.
    """
    lines = list(_from_the_end(path, begins))
    said = (line.removeprefix("error: ") for line in lines if line.startswith("error: "))
    return next(said, next(iter(lines), "no word"))


def _from_the_end(path: Path, begins: int = 0) -> Iterator[str]:
    """Lines at the end of a log that say something, the last one first."""
    try:
        with path.open("rb") as file:
            file.seek(max(begins, path.stat().st_size - TAIL))
            lines = file.read().decode(errors="replace").split("\n")
    except OSError:
        return
    yield from (line for line in reversed(lines) if line.strip())


def watching(
    interactive: bool, seconds: dict[str, float]
) -> tuple[AbstractContextManager[Any], Callable[[str], None], Callable[[Sweep], None]]:
    """What to be within while a sweep runs, how it says something, and what looks at it now and then."""
    if not interactive:
        return nullcontext(), terminal.say, lambda sweep: None
    watch = LiveView(seconds)
    return watch.live, watch.say, watch.look
