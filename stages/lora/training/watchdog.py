"""Hang detector: aborts when a training step takes far too long, and prints the stack of each process.

A process that is blocked in a collective or in DDP's backward pass waits for the others; those are the
suspects. With NCCL a process may wait in any call that needs a result: then all stacks are printed and none
is named. A call that never releases the interpreter's lock is not noticed.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
import time
import traceback
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import Any

from transformers import TrainerCallback

from stages.errors import ServerError
from stages.runtime import distributed

log = logging.getLogger(__name__)

MEDIAN_FACTOR = 20
"""A step that takes this many times the median step, and LONGEST_FACTOR times the longest one, has hung."""
LONGEST_FACTOR = 3
LEAST_S = 300.0
"""Least limit in seconds: a step may write a checkpoint, or share the machine with other programs."""
KNOWN = 3
"""Steps to time before there is a limit; with several optimizer steps per generation, generations."""
WAITING = ("torch/distributed/", "torch/nn/parallel/distributed.py", "torch/autograd/graph.py")
"""Files of calls in which a process waits for the others; the last one is autograd's backward pass."""
TICK_S = 1.0
SETTLE_S = 15.0
"""Seconds in which the other processes may report whether they wait, before this one exits."""
SHOWN = 12
"""Innermost stack frames that are printed for each process."""


class Watchdog(TrainerCallback):
    """Watches the time of each step from a thread of its own."""

    def __init__(self, folder: Path, passes: int = 1) -> None:
        """folder: shared by all processes of the run. passes: optimizer steps per generation."""
        self._folder, self._known = folder, KNOWN * passes
        self._main = threading.get_ident()
        self._steps: list[float] = []
        self._step = 0
        self._begun = time.monotonic()
        self._ticks = 0
        self._stopped = threading.Event()

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        # Delete this process's report of an earlier run. Other processes may have written theirs already.
        self._report_file(distributed.rank()).unlink(missing_ok=True)
        self._begun = time.monotonic()
        threading.Thread(target=self._watch, daemon=True).start()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        now = time.monotonic()
        self._steps.append(now - self._begun)
        self._begun, self._ticks = now, 0
        self._step = state.global_step

    def stop(self) -> None:
        self._stopped.set()

    def _watch(self) -> None:
        # Count ticks, not time on the clock: a process that was suspended for a while has not hung.
        while not self._stopped.wait(TICK_S):
            self._ticks += 1
            if len(self._steps) < self._known:
                continue
            limit = max(LEAST_S, MEDIAN_FACTOR * median(self._steps), LONGEST_FACTOR * max(self._steps))
            if self._ticks * TICK_S > limit:
                self._end(limit)

    def _end(self, limit: float) -> None:
        """Print this process's stack, report whether it waits, and exit: its main thread cannot be woken."""
        stack = traceback.extract_stack(sys._current_frames()[self._main])
        waits = any(file in frame.filename for frame in stack for file in WAITING)
        with suppress(OSError):  # a full disk must not keep it from ending
            self._folder.mkdir(parents=True, exist_ok=True)
            self._report_file(distributed.rank()).write_text(json.dumps(waits), encoding="utf-8")
        innermost = "".join(traceback.format_list(stack[-SHOWN:]))
        who = f"process {distributed.rank()} " if distributed.world_size() > 1 else ""
        log.error("%sstands here, innermost last:\n%s", who, innermost.rstrip())
        if distributed.world_size() > 1:
            time.sleep(SETTLE_S)
        error = ServerError(
            f"step {self._step + 1} has taken {limit:.0f} s, {MEDIAN_FACTOR} times the median or more"
            + self._suspects(),
            "where it stands is above; the same command, without --force, goes on from the last checkpoint",
        )
        if not distributed.report_failure(error):
            log.error("error: %s\n  hint: %s", error, error.hint)
        os._exit(error.exit_code)

    def _report_file(self, rank: int) -> Path:
        """File in which a process reports whether it waits for others: true or false."""
        return self._folder / f"stuck-{rank}.json"

    def _suspects(self) -> str:
        """Name the processes that others wait for, or else those without a report; "" for one process."""
        waiting: list[str] = []
        working: list[str] = []
        silent: list[str] = []
        for rank in range(distributed.world_size() if distributed.world_size() > 1 else 0):
            try:
                waits = json.loads(self._report_file(rank).read_text(encoding="utf-8"))
                (waiting if waits else working).append(str(rank))
            except (OSError, ValueError):
                silent.append(str(rank))
        if waiting and working:
            return f": process {', '.join(waiting)} waits for process {', '.join(working)}"
        return f": process {', '.join(silent)} says nothing" if silent else ""
