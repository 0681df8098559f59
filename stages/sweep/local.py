"""Runs the steps of a table on this machine: as many at a time as there are places for them."""

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
from stages.sweep.graph import PLANNED, Node, Place

BUSY, NO_SERVER = BusyError.exit_code, ServerError.exit_code
"""Exit codes after which a step is tried again: another process makes the same, or its server was gone."""
TRIES = 3
"""Of a step whose server was gone; one that another process makes waits as long as it takes."""
PAUSE = 20.0
"""Seconds before a step is tried again."""
TURN = 1.0
"""Seconds that a device is left to other sweeps between two steps."""
TICK = 0.2
"""Seconds between two looks at the children."""


Start = Callable[[list[str], dict[str, str], IO[bytes]], Child]
"""Starts `lorapar ARGUMENTS`, guarded, in this environment, with all that it says in this file."""


def spawned(arguments: list[str], env: dict[str, str], log: IO[bytes]) -> Child:
    return process_guard.start([sys.executable, "-m", "lorapar_cli", *arguments], env, log)


def is_current(node: Node, stores: dict[str, Store]) -> bool:
    """stores: by the folder of the run; one remembers what it has verified of the inputs."""
    root = node.place[0]
    return state(stores.setdefault(root, Store(Path(root))), node.step).state == "current"


@dataclass(frozen=True)
class Outcome:
    """How a step ended."""

    node: Node
    how: str
    """done, failed, or left out because what it needs failed."""
    code: int | None = None
    log: Path | None = None
    seconds: float = 0.0
    begins: int = 0
    """Where in the log its last try begins."""


class Lease:
    """The right to use GPUs, among all sweeps of this person on this machine; the kernel ends it with us."""

    def __init__(self, devices: str) -> None:
        """devices: numbers, separated by commas."""
        folder = Path(tempfile.gettempdir()) / f"lorapar-devices-{os.getuid()}"
        folder.mkdir(mode=0o700, exist_ok=True)
        self._locks = [FileLock(folder / f"{name}.lock", timeout=0) for name in sorted(devices.split(","))]

    def taken(self) -> bool:
        """Take all of them, or none."""
        try:
            for lock in self._locks:
                lock.acquire()
        except Timeout:
            self.give_back()
            return False
        return True

    def give_back(self) -> None:
        for lock in self._locks:
            lock.release()


class Sweep:
    """The state of all steps; `run` brings them to their end.

    A step that fails stops only what needs it. When the sweep is interrupted, its children are, too, and the
    same command goes on where it stopped.
    """

    def __init__(
        self,
        nodes: dict[Place, Node],
        places: list[str | None],
        logs: Path,
        say: Callable[[str], None],
        look: Callable[[Sweep], None] = lambda sweep: None,
        start: Start = spawned,
    ) -> None:
        """places: one for each step that may run at a time: a device for CUDA_VISIBLE_DEVICES, or None.

        look: called with the sweep several times a second. start: starts the guarded command of a step.
        """
        self.start = start
        self.nodes, self.places, self.logs, self.say, self.look = nodes, list(places), logs, say, look
        self.waiting = [place for place, node in nodes.items() if not node.current]
        self.done = {place for place, node in nodes.items() if node.current}
        self.ended: dict[Place, Outcome] = {}
        self.tries: dict[Place, int] = {}
        self.later: dict[Place, float] = {}
        self.stores: dict[str, Store] = {}
        self.running: dict[Place, tuple[Child, str | None, float]] = {}
        self.leases: dict[str, Lease] = {}
        self.rests_until: dict[str, float] = {}
        """Devices that were just given back: another sweep that waits for one has its turn."""
        self.told: set[str] = set()
        self.begins: dict[Place, int] = {}
        """Where in its log the last try of a step begins."""

    def run(self) -> list[Outcome]:
        """How each step ended that was not there before."""
        self.logs.mkdir(parents=True, exist_ok=True)
        try:
            while self.waiting or self.running:
                self._start()
                self.look(self)
                time.sleep(TICK)
                self._collect()
        finally:
            for child, *_ in self.running.values():
                child.stdin.close()  # type: ignore[union-attr]  # the guard then ends the step and its children
            for child, *_ in self.running.values():
                child.wait()
            for lease in self.leases.values():
                lease.give_back()
        return list(self.ended.values())

    def _start(self) -> None:
        now, full = time.monotonic(), False
        for place in [place for place in self.waiting if self.later.get(place, 0) <= now]:
            node = self.nodes[place]
            if any(before in self.ended and before not in self.done for before in node.inputs):
                self.waiting.remove(place)
                self.ended[place] = Outcome(node, "left out")
            elif not full and self.done.issuperset(node.inputs):
                free = self._free()
                full = free is None
                if free is not None:
                    self.waiting.remove(place)
                    self._spawn(place, self.places.pop(free))

    def _free(self) -> int | None:
        """Index of a place where a step can begin: its devices are leased, if it has any."""
        for index, device in enumerate(self.places):
            if device is None:
                return index
            if self.rests_until.get(device, 0) > time.monotonic():
                continue
            if (lease := Lease(device)).taken():
                self.leases[device] = lease
                self.told.discard(device)
                return index
            if device not in self.told:
                self.told.add(device)
                self.say(f"device {device} is in use by another sweep: waiting for it")
        return None

    def _spawn(self, place: Place, device: str | None) -> None:
        node = self.nodes[place]
        environment = os.environ | {PLANNED: node.step.key}
        environment |= {} if device is None else {"CUDA_VISIBLE_DEVICES": device}
        with self.log(node).open("ab") as log:
            self.begins[place] = log.tell()
            child = self.start(node.command, environment, log)
        self.running[place] = (child, device, time.monotonic())
        self.say(f"begins: {node.title}{'' if device is None else f' on device {device}'}")

    def _collect(self) -> None:
        for place, (child, device, begun) in list(self.running.items()):
            code = child.poll()
            if code is None:
                continue
            del self.running[place]
            self.places.append(device)
            if device is not None:
                self.leases.pop(device).give_back()
                self.rests_until[device] = time.monotonic() + TURN
            node = self.nodes[place]
            seconds = time.monotonic() - begun
            self.tries[place] = self.tries.get(place, 0) + (code == NO_SERVER)
            if code == 0 and not is_current(node, self.stores):
                self.ended[place] = Outcome(node, "failed", code, self.log(node), seconds, self.begins[place])
                self.say(f"made something else, its inputs have changed: {node.title}; see {self.log(node)}")
            elif code == 0:
                self.done.add(place)
                self.ended[place] = Outcome(node, "done", 0, self.log(node), seconds)
                left = len(self.waiting) + len(self.running)
                self.say(f"done in {seconds:.0f} s, {left} left: {node.title}")
            elif code == BUSY or (code == NO_SERVER and self.tries[place] < TRIES):
                self.waiting.append(place)
                self.later[place] = time.monotonic() + PAUSE
                self.say(f"exit code {code}, will be tried again: {node.title}")
            else:
                self.ended[place] = Outcome(node, "failed", code, self.log(node), seconds, self.begins[place])
                self.say(f"failed with exit code {code}: {node.title}; see {self.log(node)}")

    def log(self, node: Node) -> Path:
        """Where a step writes what it says."""
        return self.logs / f"{node.stage}-{node.step.key}.log"
