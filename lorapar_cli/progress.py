"""Shows the progress of a stage: as a bar on a terminal, elsewhere as lines of a log."""

from __future__ import annotations

import time
from typing import Any

from lorapar_cli import terminal

LOG_EVERY_S = 10
"""Seconds between two lines of a log on one task."""


class TerminalProgress:
    """Progress of the steps of one stage, as a context."""

    def __init__(self, title: str = "") -> None:
        """title: of the stage, with its position in the run."""
        self.title, self._task, self._done, self._note = title, "", 0, ""
        self._total: int | None = None
        self._begun = self._logged = 0.0
        self._bar: Any = None
        self._row: Any = None

    def __enter__(self) -> TerminalProgress:
        if terminal.interactive():
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            self._bar = Progress(
                TextColumn("{task.description}"), BarColumn(24), MofNCompleteColumn(), TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"), console=terminal.console(), transient=True,
            )  # fmt: skip
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.done()
        if self._bar:
            self._bar.stop()

    def start(self, task: str, total: int | None = None) -> None:
        self.done()
        self._task, self._total, self._done, self._note = task, total, 0, ""
        self._begun = self._logged = time.monotonic()
        if self._bar:
            self._row = self._bar.add_task(f"{self.title} {task}".strip(), total=total, note="")
        elif not total:
            terminal.say(task)

    def advance(self, n: int = 1, note: str = "") -> None:
        self._done, self._note = self._done + n, note
        if self._row is not None:
            self._bar.update(self._row, advance=n, note=note)
        elif self._task and self._total and time.monotonic() - self._logged >= LOG_EVERY_S:
            self._log()

    def say(self, text: str) -> None:
        terminal.say(text)

    def done(self) -> None:
        """End the task. A log gets a last line on it."""
        if self._row is not None:
            self._bar.remove_task(self._row)
            self._row = None
        elif self._task and self._total:
            self._log()
        self._task = ""

    def _log(self) -> None:
        self._logged = time.monotonic()
        count = f"{self._done}/{self._total} in {terminal.duration(self._logged - self._begun)}"
        terminal.say("  ".join(filter(None, (self._task, count, self._note))))
