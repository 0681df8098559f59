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
            if (current := content()) and (text := self._render(current)) != self._text:
                self._text = text
                _write(f"\r{text}\x1b[K")

    @contextmanager
    def above(self) -> Iterator[None]:
        """Make room for a message: the line goes, until it is drawn again below the message."""
        with self._lock:
            self.erase()
            yield

    def erase(self, end: str = "\r\x1b[K") -> None:
        with self._lock:
            if self._text:
                self._text = ""
                _write(end)

    def leave(self) -> None:
        """Let the line stand, and go to the next row."""
        self.erase(end="\n")

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
    from rich.text import Text

    size = LONG_BAR if width >= WIDE else BAR
    filled = min(size, int(size * (content.share or 0)))
    bar = Text.assemble((strokes[0] * filled, "green"), (strokes[1] * (size - filled), "dim"))
    numbers = [Text(escaping.one_line(number), "cyan") for number in content.numbers]

    def line(label: int, times: int, has_bar: bool, shown: int = 0) -> Text:
        label_, title = Text(content.labels[label], "dim"), Text(escaping.one_line(content.title), "bold")
        bars = [bar] if has_bar and content.share is not None else []
        texts = [Text(content.count), Text(content.times[times]), *numbers[:shown]]
        return Text(GAP).join(part for part in (label_, title, *bars, *texts) if part)

    def fits(text: Text) -> bool:
        return bool(text.cell_len <= width)

    # A short label makes room for the bar and a number; where it cannot, the long one is of more use.
    forms = [(0, 0, True, 1), (1, 0, True, 1)]
    forms += [(*lengths, has_bar, 0) for lengths in ((0, 0), (1, 0), (1, 1)) for has_bar in (True, False)]
    label, times, has_bar, _ = next((form for form in forms if fits(line(*form))), forms[-1])
    shown = max((n for n in range(len(numbers) + 1) if fits(line(label, times, has_bar, n))), default=0)
    chosen = line(label, times, has_bar, shown)
    chosen.truncate(width)
    return chosen
