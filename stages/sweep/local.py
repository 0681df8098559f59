"""Runs the steps of a sweep on this machine, as many at a time as there are slots."""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from filelock import FileLock, Timeout

from stages.errors import BusyError, ServerError
from stages.pipeline.state import state
from stages.runtime import process_guard
from stages.runtime.process_guard import Child
from stages.store.artifacts import Store
from stages.sweep.graph import PLANNED, ArtifactId, Node

BUSY, SERVER_FAILED = BusyError.exit_code, ServerError.exit_code
"""Exit codes after which a step is retried: another process makes the same artifact, or a server failed."""
MAX_SERVER_FAILURES = 3
"""After this many server failures, a step has failed. There is no limit for BUSY."""
RETRY_AFTER_S = 20.0
DEVICE_PAUSE_S = 1.0
"""Pause between two steps on a device, in which another sweep can take it."""
POLL_S = 0.2
"""Interval at which the child processes are polled."""


StartProcess = Callable[[list[str], dict[str, str], IO[bytes]], Child]
"""Starts guarded `lorapar ARGUMENTS` with this environment; the file takes stdout and stderr."""


def spawned(arguments: list[str], env: dict[str, str], log: IO[bytes]) -> Child:
    return process_guard.start([sys.executable, "-m", "lorapar_cli", *arguments], env, log)


def is_current(node: Node, stores: dict[str, Store]) -> bool:
    """True if the node's artifact is up to date now.

    stores: a cache by folder of the run; each store remembers what it has verified of the inputs.
    """
    root = node.id[0]
    return state(stores.setdefault(root, Store(Path(root))), node.step).state == "current"


@dataclass(frozen=True)
class Outcome:
    """Result of a step that has ended."""

    node: Node
    status: str
    """done, failed, or left out (an input failed)."""
    code: int | None = None
    """Exit code."""
    log: Path | None = None
    seconds: float = 0.0
    log_offset: int = 0
    """Byte of the log at which the last try begins."""


class Lease:
    """Exclusive use of GPUs among all sweeps of this user on this machine.

    It rests on file locks, which the kernel releases when the process ends.
    """

    def __init__(self, devices: str) -> None:
        """devices: numbers, separated by commas."""
        folder = Path(tempfile.gettempdir()) / f"lorapar-devices-{os.getuid()}"
        folder.mkdir(mode=0o700, exist_ok=True)
        self._locks = [FileLock(folder / f"{name}.lock", timeout=0) for name in sorted(devices.split(","))]

    def acquire(self) -> bool:
        """Lock all devices, or none. Returns whether they are locked; does not wait."""
        try:
            for lock in self._locks:
                lock.acquire()
        except Timeout:
            self.release()
            return False
        return True

    def release(self) -> None:
        for lock in self._locks:
            lock.release()


@dataclass(frozen=True)
class Running:
    """A step whose process is running."""

    child: Child
    device: str | None
    started: float
    """time.monotonic() at the start."""
    log_offset: int
    """Byte of the log at which this try begins."""


class Sweep:
    """Scheduler of all steps; `run` runs them to the end.

    A failed step stops only the steps that need it. If the sweep is interrupted, so are its children; the
    same command resumes it.
    """

    def __init__(
        self,
        nodes: dict[ArtifactId, Node],
        slots: list[str | None],
        logs: Path,
        say: Callable[[str], None],
        on_poll: Callable[[Sweep], None] = lambda sweep: None,
        start: StartProcess = spawned,
    ) -> None:
        """nodes: in topological order. on_poll: called every POLL_S seconds.

        slots: the CUDA_VISIBLE_DEVICES of each step that may run at a time; None leaves it as it is.
        """
        self.start = start
        self.nodes, self.logs, self.say, self.on_poll = nodes, logs, say, on_poll
        self.slots = list(slots)
        """Free slots."""
        # A step is in `waiting`, then in `running` (from where a retry leads back), then in `ended`.
        self.waiting = [artifact for artifact, node in nodes.items() if not node.current]
        self.running: dict[ArtifactId, Running] = {}
        self.ended: dict[ArtifactId, Outcome] = {}
        self.done = {artifact for artifact, node in nodes.items() if node.current}
        """Artifacts that exist: those that were current at the start, and those that were made since."""
        self.server_failures: dict[ArtifactId, int] = {}
        self.retry_at: dict[ArtifactId, float] = {}
        self.stores: dict[str, Store] = {}
        self.leases: dict[str, Lease] = {}
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
            for step in self.running.values():
                step.child.stdin.close()  # type: ignore[union-attr]  # tells the guard to end the step
            for step in self.running.values():
                step.child.wait()
            for lease in self.leases.values():
                lease.release()
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
                    self._spawn(artifact, self.slots.pop(slot))

    def _lease_slot(self) -> int | None:
        """Lease the devices of the first free slot that can be leased, and return its index in `slots`."""
        for index, device in enumerate(self.slots):
            if device is None:
                return index
            if self.paused_until.get(device, 0) > time.monotonic():
                continue
            if (lease := Lease(device)).acquire():
                self.leases[device] = lease
                self.reported_busy.discard(device)
                return index
            if device not in self.reported_busy:
                self.reported_busy.add(device)
                self.say(f"device {device} is in use by another sweep: waiting for it")
        return None

    def _spawn(self, artifact: ArtifactId, device: str | None) -> None:
        node = self.nodes[artifact]
        environment = os.environ | {PLANNED: node.step.key}
        environment |= {} if device is None else {"CUDA_VISIBLE_DEVICES": device}
        with self.log(node).open("ab") as log:
            offset = log.tell()
            child = self.start(node.command, environment, log)
        self.running[artifact] = Running(child, device, time.monotonic(), offset)
        self.say(f"started: {node.title}{'' if device is None else f' on device {device}'}")

    def _collect(self) -> None:
        """Record steps whose process has ended, and free their slots."""
        for artifact, step in list(self.running.items()):
            code = step.child.poll()
            if code is None:
                continue
            del self.running[artifact]
            self.slots.append(step.device)
            if step.device is not None:
                self.leases.pop(step.device).release()
                self.paused_until[step.device] = time.monotonic() + DEVICE_PAUSE_S
            self._record(artifact, step, code)

    def _record(self, artifact: ArtifactId, step: Running, code: int) -> None:
        """Mark a step as done or failed by its exit code, or put it back to be retried."""
        node = self.nodes[artifact]
        log, seconds = self.log(node), time.monotonic() - step.started
        failures = self.server_failures.get(artifact, 0) + (code == SERVER_FAILED)
        self.server_failures[artifact] = failures
        if code == 0 and is_current(node, self.stores):
            self.done.add(artifact)
            self.ended[artifact] = Outcome(node, "done", 0, log, seconds)
            to_do = len(self.waiting) + len(self.running)
            self.say(f"done in {seconds:.0f} s, {to_do} left: {node.title}")
        elif code == BUSY or (code == SERVER_FAILED and failures < MAX_SERVER_FAILURES):
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
        """Return the file that a step's output goes to."""
        return self.logs / f"{node.stage}-{node.step.key}.log"
