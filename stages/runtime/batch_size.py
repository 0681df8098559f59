"""A batch size that a lack of memory halves, where no result depends on it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from stages.errors import OutOfMemoryError, is_out_of_memory
from stages.runtime import resources

log = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass
class BatchSize:
    """The batch size of a setting, and how small it may become."""

    setting: str
    now: int
    hint: str
    """Advice for where no smaller batch helps."""
    least: int = 1

    def attempt(self, number: int, compute: Callable[..., T], *arguments: Any) -> T | None:
        """Return the result of `compute` for a batch of `number` examples, or None if memory ran out.

        Then `now` is half of `number`, and a warning says so; OutOfMemoryError if that was the least batch.
        """
        try:
            return compute(*arguments)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            if number <= self.least:
                raise OutOfMemoryError(f"out of memory with {self.setting} {number}", self.hint) from error
        self.now = max(self.least, number // 2)
        log.warning("out of memory with %s %d: going on with %d", self.setting, number, self.now)
        resources.release_memory()  # not in the `except` block, in which the error holds the batch's tensors
        return None
