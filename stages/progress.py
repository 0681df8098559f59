"""Interface through which a stage reports its progress."""

from typing import Protocol


class Progress(Protocol):
    """Receiver of progress reports, which may show them in a terminal or ignore them.

    `start` begins a task of `total` units, `advance` counts finished units, `say` passes on a message.
    """

    def start(self, task: str, total: int | None = None) -> None: ...
    def advance(self, n: int = 1, note: str = "") -> None: ...
    def say(self, text: str) -> None: ...
