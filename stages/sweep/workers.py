"""Makes the steps of a sweep in processes of this machine, one for each slot, which stay."""

import multiprocessing
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path

from stages.config import Config
from stages.pipeline.steps import Step
from stages.sweep.steps import Node

MakeStep = Callable[[Config, Step, list[str], Path], int]
"""Makes a step, with all output in this file, and returns the exit code that its command would have."""


class Workers:
    poll_s = 0.05

    def __init__(
        self, slots: list[str | None], begin: Callable[[str | None], None], make_step: MakeStep
    ) -> None:
        """slots: the CUDA_VISIBLE_DEVICES of each step that may run at a time. begin: sets up a process."""
        self.slots, self.begin, self.make_step = slots, begin, make_step
        self.free = list(range(len(slots)))
        self.pools: dict[int, ProcessPoolExecutor] = {}

    @property
    def has_room(self) -> bool:
        return bool(self.free)

    def submit(self, node: Node, log: Path) -> Future[int]:
        slot = self.free.pop()
        call = partial(self.make_step, node.config, node.step, node.command, log)
        try:
            job = self._pool(slot).submit(call)
        except BrokenProcessPool:  # its process was killed in the step before
            del self.pools[slot]
            job = self._pool(slot).submit(call)
        job.add_done_callback(lambda _: self.free.append(slot))
        return job

    def _pool(self, slot: int) -> ProcessPoolExecutor:
        if slot not in self.pools:
            fresh = multiprocessing.get_context("spawn")  # no GPU survives a fork
            self.pools[slot] = ProcessPoolExecutor(1, fresh, self.begin, (self.slots[slot],))
        return self.pools[slot]

    def close(self, interrupted: bool) -> None:
        if interrupted:
            for worker in multiprocessing.active_children():
                worker.terminate()
        for pool in self.pools.values():
            pool.shutdown(cancel_futures=True)
