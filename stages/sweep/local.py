"""Runs the steps of a sweep on this machine, as many at a time as there are slots."""

from __future__ import annotations

import multiprocessing
import os
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from stages.config import Config
from stages.errors import BusyError, ServerError
from stages.pipeline.state import current_artifact
from stages.pipeline.steps import Step
from stages.store.artifacts import Store
from stages.sweep.graph import ArtifactId, Node

BUSY, SERVER_FAILED = BusyError.exit_code, ServerError.exit_code
"""Exit codes after which a step is retried: another process makes the same artifact, or a server failed."""
MAX_SERVER_FAILURES = 3
"""After this many server failures, a step has failed. There is no limit for BUSY."""
RETRY_AFTER_S = 20.0
DEVICE_PAUSE_S = 1.0
"""Pause between two steps on a device, in which another sweep can take it."""
POLL_S = 0.2
"""Interval at which the workers are polled."""
PATIENCE_S = 5.0
"""Seconds from SIGTERM to SIGKILL."""
MakeStep = Callable[[Config, Step, list[str], Path], int]
"""Makes a step, with all output in this file, and returns the exit code that its command would have."""
Begin = Callable[[str | None], None]
"""Sets up the process of a worker, whose steps use these GPUs."""


class Worker:
    """A process that makes one step after the other. One that was killed is replaced."""

    def __init__(self, device: str | None, begin: Begin, make_step: MakeStep) -> None:
        """device: its CUDA_VISIBLE_DEVICES; None leaves it as it is."""
        self.device, self._begin, self._make_step = device, begin, make_step
        self._process: ProcessPoolExecutor | None = None
        self._step: Future[int] | None = None

    def start(self, node: Node, log: Path) -> None:
        if self._process is None:
            fresh = multiprocessing.get_context("spawn")  # a fork would inherit locks, and no GPU survives it
            self._process = ProcessPoolExecutor(1, fresh, self._begin, (self.device,))
        self._step = self._process.submit(self._make_step, node.config, node.step, node.command, log)

    def poll(self) -> int | None:
        """The exit code of its step; None while that runs."""
        assert self._step is not None
        if not self._step.done():
            return None
        try:
            return self._step.result()
        except BrokenProcessPool:
            self._process = None
            return 128 + signal.SIGKILL

    def close(self) -> None:
        if self._process is not None:
            self._process.shutdown(cancel_futures=True)


def _end_workers() -> None:
    """End this process's workers: what they have begun is interrupted, and can be resumed."""
    workers = multiprocessing.active_children()
    for worker in workers:
        worker.terminate()
    deadline = time.monotonic() + PATIENCE_S
    for worker in workers:
        worker.join(max(0.0, deadline - time.monotonic()))
        worker.kill()


def is_current(node: Node) -> bool:
    return bool(current_artifact(Store(Path(node.id[0])), node.step))


@dataclass(frozen=True)
class Outcome:
    node: Node
    status: str
    """done, failed, or left out (an input failed)."""
    code: int | None = None
    """Exit code."""
    log: Path | None = None
    seconds: float = 0.0
    log_offset: int = 0
    """Byte of the log at which the last try begins."""


def lease(devices: str) -> ExitStack | None:
    """Lock GPUs among all sweeps of this user on this machine, until `close`; None if one is in use.

    devices: numbers, separated by commas. The kernel releases file locks when the process ends.
    """
    folder = Path(tempfile.gettempdir()) / f"lorapar-devices-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    with ExitStack() as locks, suppress(Timeout):
        for name in sorted(devices.split(",")):
            locks.enter_context(FileLock(folder / f"{name}.lock", timeout=0))
        return locks.pop_all()
    return None


@dataclass(frozen=True)
class Running:
    worker: Worker
    started: float
    """time.monotonic() at the start."""
    log_offset: int
    """Byte of the log at which this try begins."""


class Sweep:
    """Scheduler of all steps; `run` runs them to the end.

    A failed step stops only the steps that need it. If the sweep is interrupted, so are its workers; the
    same command resumes it.
    """

    def __init__(
        self,
        nodes: dict[ArtifactId, Node],
        workers: list[Worker],
        logs: Path,
        say: Callable[[str], None],
        on_poll: Callable[[Sweep], None] = lambda sweep: None,
    ) -> None:
        """nodes: in topological order. on_poll: called every POLL_S seconds."""
        self.nodes, self.logs, self.say, self.on_poll = nodes, logs, say, on_poll
        self.workers = workers
        self.slots = list(workers)
        """Free workers."""
        # A step is in `waiting`, then in `running` (from where a retry leads back), then in `ended`.
        self.waiting = [artifact for artifact, node in nodes.items() if not node.current]
        self.running: dict[ArtifactId, Running] = {}
        self.ended: dict[ArtifactId, Outcome] = {}
        self.done = {artifact for artifact, node in nodes.items() if node.current}
        """Artifacts that exist: those that were current at the start, and those that were made since."""
        self.server_failures: Counter[ArtifactId] = Counter()
        self.retry_at: dict[ArtifactId, float] = {}
        self.leases: dict[str, ExitStack] = {}
        self.paused_until: dict[str, float] = {}
        """Device that was just released → the time until which it is left to other sweeps."""
        self.reported_busy: set[str] = set()
        """Devices for which the wait for another sweep has been reported."""

    def run(self) -> list[Outcome]:
        """Run every step that is not current, and return their outcomes."""
        self.logs.mkdir(parents=True, exist_ok=True)
        try:
            while self.waiting or self.running:
                self._start_ready()
                self.on_poll(self)
                time.sleep(POLL_S)
                self._collect()
        finally:
            if self.running:  # interrupted
                _end_workers()
            for worker in self.workers:
                worker.close()
            for locks in self.leases.values():
                locks.close()
        return list(self.ended.values())

    def _start_ready(self) -> None:
        """Start steps whose inputs are done while slots are free; leave out steps that need a failed one."""
        now, slots_free = time.monotonic(), True
        for artifact in [artifact for artifact in self.waiting if self.retry_at.get(artifact, 0) <= now]:
            node = self.nodes[artifact]
            if any(upstream in self.ended and upstream not in self.done for upstream in node.inputs):
                self.waiting.remove(artifact)
                self.ended[artifact] = Outcome(node, "left out")
            elif slots_free and self.done.issuperset(node.inputs):
                slot = self._lease_slot()
                slots_free = slot is not None
                if slot is not None:
                    self.waiting.remove(artifact)
                    self._start(artifact, self.slots.pop(slot))

    def _lease_slot(self) -> int | None:
        """Lease the devices of the first free slot that can be leased, and return its index in `slots`."""
        for index, device in enumerate(worker.device for worker in self.slots):
            if device is None:
                return index
            if self.paused_until.get(device, 0) > time.monotonic():
                continue
            if locks := lease(device):
                self.leases[device] = locks
                self.reported_busy.discard(device)
                return index
            if device not in self.reported_busy:
                self.reported_busy.add(device)
                self.say(f"device {device} is in use by another sweep: waiting for it")
        return None

    def _start(self, artifact: ArtifactId, worker: Worker) -> None:
        node = self.nodes[artifact]
        log = self.log(node)
        offset = log.stat().st_size if log.exists() else 0
        worker.start(node, log)
        self.running[artifact] = Running(worker, time.monotonic(), offset)
        self.say(f"started: {node.title}{'' if worker.device is None else f' on device {worker.device}'}")

    def _collect(self) -> None:
        """Record steps that have ended, and free their workers."""
        for artifact, step in list(self.running.items()):
            code = step.worker.poll()
            if code is None:
                continue
            del self.running[artifact]
            self.slots.append(step.worker)
            if (device := step.worker.device) is not None:
                self.leases.pop(device).close()
                self.paused_until[device] = time.monotonic() + DEVICE_PAUSE_S
            self._record(artifact, step, code)

    def _record(self, artifact: ArtifactId, step: Running, code: int) -> None:
        """Mark a step as done or failed by its exit code, or put it back to be retried."""
        node = self.nodes[artifact]
        log, seconds = self.log(node), time.monotonic() - step.started
        self.server_failures[artifact] += code == SERVER_FAILED
        may_retry = self.server_failures[artifact] < MAX_SERVER_FAILURES
        if code == 0 and is_current(node):
            self.done.add(artifact)
            self.ended[artifact] = Outcome(node, "done", 0, log, seconds)
            to_do = len(self.waiting) + len(self.running)
            self.say(f"done in {seconds:.0f} s, {to_do} left: {node.title}")
        elif code == BUSY or (code == SERVER_FAILED and may_retry):
            self.waiting.append(artifact)
            self.retry_at[artifact] = time.monotonic() + RETRY_AFTER_S
            self.say(f"exit code {code}, will be retried: {node.title}")
        else:
            self.ended[artifact] = Outcome(node, "failed", code, log, seconds, step.log_offset)
            reason = (
                f"failed with exit code {code}"
                if code
                else "made another artifact, because its inputs have changed"
            )
            self.say(f"{reason}: {node.title}; see {log}")

    def log(self, node: Node) -> Path:
        return self.logs / f"{node.stage}-{node.step.key}.log"
