"""A batch size that a lack of memory halves, where no result depends on it."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from stages.errors import OutOfMemoryError, is_out_of_memory

log = logging.getLogger(__name__)


@dataclass
class BatchSize:
    """The batch size of a setting, and how small it may become.

        while …:
            try:
                …  # of `now` examples
            except (MemoryError, RuntimeError) as error:
                size.halve(error, examples)
                … = None  # what the batch left
            resources.release_memory()

    Memory is released after the `except` block: until its end the error holds the tensors of the batch.
    """

    setting: str
    now: int
    hint: str
    """What helps where no smaller batch does."""
    least: int = 1

    def halve(self, error: BaseException, used: int) -> None:
        """Go on with half of the batch that was used if `error` is a lack of memory, and warn.

        Raises `error` if it is anything else, and OutOfMemoryError if the batch was the least one.
        """
        if not is_out_of_memory(error):
            raise error
        if used <= self.least:
            raise OutOfMemoryError(f"out of memory with {self.setting} {used}", self.hint) from error
        self.now = max(self.least, used // 2)
        log.warning("out of memory with %s %d: going on with %d", self.setting, used, self.now)
