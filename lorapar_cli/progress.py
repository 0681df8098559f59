"""Shows the progress of a stage: as a live line on a terminal, elsewhere as lines of a log."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import takewhile
from types import TracebackType

from lorapar_cli import terminal
from lorapar_cli.live_line import Content, interactive
from lorapar_cli.terminal import duration
from stages.pipeline.run import Task
from stages.pipeline.state import current_artifact
from stages.store import estimates
from stages.store.artifacts import Store

LOG_EVERY_S = 10
"""Seconds from the start of a task to its first line in a log, and from line to line."""
TICK_S = 0.25
"""Seconds between two looks at the progress, so that a line counts a whole batch of answers."""


@dataclass(frozen=True)
class Position:
    number: int
    stages: int
    planned: dict[str, float | None]
    """The steps to make from this stage to the end of the run → seconds that `lorapar plan` estimated."""

    @property
    def labels(self) -> tuple[str, str]:
        """A long and a short form."""
        return f"stage {self.number} of {self.stages}", f"{self.number}/{self.stages}"

    @classmethod
    def from_task(cls, task: Task, store: Store) -> Position:
        pending = [step for step in task.remaining if task.force or not current_artifact(store, step)]
        costs = {step.name: estimates.load(store.root, step.key) for step in pending}
        return cls(task.number, task.tasks, {name: cost and cost.seconds for name, cost in costs.items()})


@dataclass
class Bar:
    """A task of a step, of which a part is done."""

    title: str
    total: int | None
    started_s: float
    advanced_s: float
    logged_s: float
    """The time of the last line in the log; at first that of the start."""
    logged: int = 0
    """The count in that line."""
    done: int = 0
    note: str = ""

    def seconds_left(self, now_s: float) -> float | None:
        """Extrapolate the speed so far; None if nothing is done yet."""
        if not self.total or not self.done:
            return None
        # Time left at the last advance, at the mean speed up to then; the time since has passed already.
        at_last_advance = (self.advanced_s - self.started_s) / self.done * (self.total - self.done)
        return max(0.0, at_last_advance - (now_s - self.advanced_s))


class TerminalProgress:
    """Progress of the steps of one stage, as a context.

    While a task advances, only a thread of its own writes: a terminal that is not read delays no stage.
    """

    def __init__(self, position: Position | None, clock: Callable[[], float] = time.monotonic) -> None:
        self.position, self.clock = position, clock
        self._interactive = interactive()
        self._state, self._writing = threading.Lock(), threading.Lock()
        self._exiting = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._step, self._step_started_s = "", 0.0
        self._bar: Bar | None = None

    def __enter__(self) -> TerminalProgress:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the line. After an error it stays: it tells how far the stage came."""
        self._exiting.set()
        self._thread.join(1)
        if kind is None:
            self.done()
        else:
            terminal.live_line.leave()

    def begin(self, step: str) -> None:
        """Begin a step. Before its first task the live line shows its name."""
        with self._state:
            self._step, self._step_started_s = step, self.clock()

    def start(self, task: str, total: int | None = None) -> None:
        self._end_task()
        now_s = self.clock()
        self._bar = Bar(task, total, now_s, now_s, now_s)
        if not total and not self._interactive:
            terminal.say(task)

    def advance(self, n: int = 1, note: str = "") -> None:
        with self._state:
            if self._bar:
                self._bar.done, self._bar.note = self._bar.done + n, note
                self._bar.advanced_s = self.clock()

    def say(self, text: str) -> None:
        terminal.say(text)

    def done(self) -> None:
        self._end_task()
        self._step = ""
        terminal.live_line.erase()

    def _end_task(self) -> None:
        """End the task. A log gets a last line on it."""
        if not self._interactive:
            self._log(last=True)
        self._bar = None

    def _watch(self) -> None:
        while not self._exiting.wait(TICK_S):
            self.tick()

    def tick(self) -> None:
        """Draw the line on a terminal; write one to a log when it is time."""
        if self._interactive:
            terminal.live_line.draw(self.content)
        else:
            self._log()

    def _log(self, last: bool = False) -> None:
        with self._writing:
            with self._state:
                bar, now_s = self._bar, self.clock()
                if not bar or bar.done == bar.logged or not (last or now_s - bar.logged_s >= LOG_EVERY_S):
                    return
                bar.logged, bar.logged_s = bar.done, now_s
                times = [f"{bar.done}/{bar.total} in {duration(bar.advanced_s - bar.started_s)}"]
                if bar.done != bar.total and (left := self._times(bar.advanced_s)[0]):
                    times.append(left)
            terminal.say("  ".join(filter(None, (bar.title, ", ".join(times), bar.note))))

    def content(self) -> Content | None:
        """Return what the live line shows now; None between two steps."""
        with self._state:
            bar = self._bar
            if not self._step:
                return None
            return Content(
                title=bar.title if bar else self._step,
                labels=self.position.labels if self.position else ("", ""),
                count=f"{bar.done}/{bar.total}" if bar and bar.total else "",
                share=bar.done / bar.total if bar and bar.total else None,
                times=self._times(self.clock()),
                numbers=[number for number in bar.note.split("  ") if number] if bar else [],
            )

    def _times(self, now_s: float) -> tuple[str, str]:
        """Return the time left of the stage and of the run as a text, and that of the stage alone.

        The time left of the current step is extrapolated from its task, or else comes from `lorapar plan`, as
        that of later steps does. A step without an estimate is not counted in the stage, and the time of the
        run is then not shown.
        """
        planned = self.position.planned if self.position else {}
        left_s = self._bar.seconds_left(now_s) if self._bar else None
        if left_s is None and (estimate := planned.get(self._step)) is not None:
            left_s = max(0.0, estimate - (now_s - self._step_started_s))
        if left_s is None:
            return "", ""
        names = list(planned)
        later = names[names.index(self._step) + 1 :] if self._step in names else []
        of_stage = list(takewhile(lambda name: name.split(":")[0] == self._step.split(":")[0], later))
        stage_s = left_s + sum(planned[name] or 0.0 for name in of_stage)
        stage = f"{duration(stage_s)} left" if stage_s else ""
        if of_stage == later or None in (planned[name] for name in later):
            return stage, stage
        run = f"run {duration(left_s + sum(planned[name] or 0.0 for name in later))}"
        return ", ".join(filter(None, (stage, run))), stage


class Silence:
    """Progress that prints nothing, for every rank but the first."""

    def __enter__(self) -> Silence:
        return self

    def __exit__(self, *_: object) -> None: ...
    def _ignore(self, *_: object, **__: object) -> None: ...

    begin = start = advance = say = done = _ignore
