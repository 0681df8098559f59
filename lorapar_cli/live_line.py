"""The live line: the last row of a terminal, which is rewritten in place while messages go above it.

It never hides the cursor and takes one row, so that a killed process leaves a terminal in order.
"""

import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import accumulate
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
    labels: tuple[str, str] = ("", "")
    """The position of the stage in the run, in a long and in a short form."""
    count: str = ""
    share: float | None = None
    """The part of the task that is done; None draws no bar."""
    times: tuple[str, str] = ("", "")
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
        strokes = "#-" if self._console.options.ascii_only else "━─"
        line = layout(content, self._console.width - 1, strokes)
        with self._console.capture() as capture:
            self._console.print(line, end="", no_wrap=True, crop=False)
        return str(capture.get())


def _write(text: str) -> None:
    with suppress(OSError):
        sys.stderr.write(text)
        sys.stderr.flush()


def layout(content: Content, width: int, strokes: str) -> Any:
    """Return rich's text of what fits into `width` columns: all, or short forms, fewer numbers, no bar.

    strokes: the characters of the bar, for what is done and what is not.
    """
    from rich.cells import cell_len, set_cell_size
    from rich.text import Text

    title = escaping.one_line(content.title)
    numbers = [escaping.one_line(number) for number in content.numbers]
    bar_width = LONG_BAR if width >= WIDE else BAR
    widths = [*([bar_width] if content.share is not None else []), *map(cell_len, numbers[:1])]
    extras = sum(len(GAP) + columns for columns in widths)
    # A short label makes room for the bar and a number; where it cannot, the long one is of more use.
    for i, j, least_room in ((0, 0, extras), (1, 0, extras), (0, 0, 0), (1, 0, 0), (1, 1, 0)):
        label, times = content.labels[i], content.times[j]
        texts = [text for text in (label, title, content.count, times) if text]
        room = width - cell_len(GAP.join(texts))
        if room >= least_room:
            break
    else:
        return Text(set_cell_size(GAP.join(texts), width))
    has_bar = content.share is not None and room >= len(GAP) + bar_width
    room -= len(GAP) + bar_width if has_bar else 0
    ends = accumulate(len(GAP) + cell_len(number) for number in numbers)
    numbers = [number for number, end in zip(numbers, ends, strict=True) if end <= room]
    parts = [Text(label, "dim")] if label else []
    parts.append(Text(title, "bold"))
    if has_bar:
        filled = min(bar_width, int(bar_width * (content.share or 0)))
        bar = (strokes[0] * filled, "green"), (strokes[1] * (bar_width - filled), "dim")
        parts.append(Text.assemble(*bar))
    parts += [Text(text) for text in (content.count, times) if text]
    parts += [Text(number, "cyan") for number in numbers]
    return Text(GAP).join(parts)
