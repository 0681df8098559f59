"""How a stage reports its progress, without knowing who listens."""

from typing import Protocol


class Progress(Protocol):
    """Receives the reports of a stage; it may show them in a terminal or ignore them.

    `start` begins a piece of work of `total` units, `advance` counts units done, `say` passes on a sentence.
    """

    def start(self, what: str, total: int | None = None) -> None: ...
    def advance(self, n: int = 1, note: str = "") -> None: ...
    def say(self, text: str) -> None: ...
