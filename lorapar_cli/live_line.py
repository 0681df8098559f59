"""The live line: the last row of a terminal, which is rewritten in place while messages go above it.

It never hides the cursor and takes one row, so that a killed process leaves a terminal in order.
"""

import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from stages import escaping

GAP = "  "
WIDE = 100
"""Columns of a terminal from which on it gets the longer bar."""
BAR, LONG_BAR = 10, 24


@dataclass(frozen=True)
class Content:
    """The texts of a live line."""

    title: str
    labels: tuple[str, ...] = ("",)
    """The position of the stage in the run, in a long and in a short form."""
    count: str = ""
    share: float | None = None
    """The part of the task that is done; None draws no bar."""
    times: tuple[str, ...] = ("",)
    """The time left, in a long and in a short form."""
    numbers: list[str] = field(default_factory=list)
    """The last values of the metrics, each of which may be left out."""


def interactive() -> bool:
    """True if stderr is a terminal on which a line can be rewritten."""
    return sys.stderr.isatty() and os.environ.get("TERM") not in ("dumb", "unknown")


def colored() -> bool:
    return interactive() and not os.environ.get("NO_COLOR")


class LiveLine:
    """The last row of the terminal. Errors of writing are ignored: no work may end with its terminal."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._text = ""
        """The line that stands on the terminal."""
        self._console: Any = None

    def draw(self, content: Callable[[], Content | None]) -> None:
        """Write the line anew. content: called when nobody else writes; no line is drawn if it gives None."""
        with self._lock:
            if (current := content()) is None:
                return
            text = self._render(current)
            if text != self._text:
                self._text = text
                _write(f"\r{text}\x1b[K")

    @contextmanager
    def above(self) -> Iterator[None]:
        """Make room for a message: the line goes, until it is drawn again below the message."""
        with self._lock:
            self.erase()
            yield

    def erase(self) -> None:
        with self._lock:
            if self._text:
                self._text = ""
                _write("\r\x1b[K")

    def leave(self) -> None:
        """Let the line stand, and go to the next row."""
        with self._lock:
            if self._text:
                self._text = ""
                _write("\n")

    def _render(self, content: Content) -> str:
        """Return the line with its colors. It is shorter than the terminal, on which it would else break."""
        from rich.console import Console

        if self._console is None:
            self._console = Console(
                stderr=True, highlight=False, color_system="auto" if colored() else None, force_terminal=True
            )
        with self._console.capture() as capture:
            for part in layout(content, self._console.width - 1):
                self._console.print(part, end="", no_wrap=True, crop=False)
        return str(capture.get())


def _write(text: str) -> None:
    with suppress(OSError):
        sys.stderr.write(text)
        sys.stderr.flush()


def layout(content: Content, width: int) -> list[Any]:
    """Choose what fits into `width` columns: first short forms, then fewer numbers, then no bar.

    Returns what rich prints, one after the other: texts, and a bar between them.
    """
    from rich.cells import cell_len, set_cell_size
    from rich.progress_bar import ProgressBar
    from rich.text import Text

    def texts(label: str, time: str) -> list[str]:
        return [label, escaping.one_line(content.title), content.count, time]

    def length(parts: list[str]) -> int:
        return cell_len(GAP.join(filter(None, parts)))

    long, short = (content.labels[0], content.labels[-1]), (content.times[0], content.times[-1])
    forms = [texts(long[0], short[0]), texts(long[1], short[0]), texts(long[1], short[1])]
    parts = next((form for form in forms if length(form) <= width), forms[-1])
    room = width - length(parts)
    if room < 0:
        return [Text(set_cell_size(GAP.join(filter(None, parts)), width))]
    bar_width = LONG_BAR if width >= WIDE else BAR
    bar_room = bar_width + len(GAP) if content.share is not None else 0
    numbers = []
    for number in map(escaping.one_line, content.numbers):
        if (needed := len(GAP) + cell_len(number)) <= room - bar_room:
            numbers.append(number)
            room -= needed
    label, title, count, time = parts
    head = Text.assemble((label, "dim"), GAP if label else "", (title, "bold"))
    tail = Text.assemble(count, GAP if count and time else "", time)
    for number in numbers:
        tail.append(GAP).append(number, "cyan")
    line: list[Any] = [head]
    if bar_room and room >= bar_room:
        bar = ProgressBar(
            total=1,
            completed=content.share or 0,
            width=bar_width,
            complete_style="green",
            finished_style="green",
        )
        line += [GAP, bar]
    return [*line, *([GAP, tail] if tail else [])]
