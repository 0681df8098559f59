"""Where a stage reports how far it is; a terminal or a silence stands behind it."""

from typing import Protocol


class Progress(Protocol):
    """Where a stage reports how far it is."""

    def start(self, what: str, total: int | None = None) -> None: ...
    def advance(self, n: int = 1, note: str = "") -> None: ...
    def say(self, text: str) -> None: ...
