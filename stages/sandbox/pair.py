"""Runs a program and its tests, each in a separate sandbox, and passes the calls between them."""

import contextlib
import json
import os
import selectors
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

from stages.sandbox.backends import ChildProcess, Limits
from stages.sandbox.inside import MAX_LINE

START_S = 30
"""Seconds after which a sandbox that is not ready has failed, however busy the machine is."""
MAX_OUTPUT = 2**20
KEPT_OUTPUT = 4096

Backend = Callable[[str, Limits], AbstractContextManager[ChildProcess]]


class SandboxFailure(Exception):
    """The sandbox itself did not work, which says nothing about the program."""


@dataclass(frozen=True)
class Verdict:
    """The outcome of a program's tests."""

    status: str
    """passed, failed, suspicious (a result is not plain data), timeout, broken (does not load), crashed or
    flooded (too much output)."""
    why: str
    output: str
    """The end of what the program wrote."""

    @property
    def passed(self) -> bool:
        return self.status == "passed"


class _Ended(Exception):
    def __init__(self, status: str, why: str) -> None:
        super().__init__(status)
        self.status, self.why = status, why


class _Sandboxed:
    """One process in a sandbox: its lines, and the end of what it wrote to its error stream."""

    def __init__(self, start: ChildProcess) -> None:
        self.process = subprocess.Popen(
            start.command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=start.environment,
            pass_fds=start.files,
            start_new_session=True,
            cwd="/",
        )
        self._line = b""
        self._written, self.output = 0, b""
        self._selector = selectors.DefaultSelector()
        assert self.process.stdout and self.process.stderr and self.process.stdin
        for pipe in (self.process.stdout, self.process.stderr):
            os.set_blocking(pipe.fileno(), False)
            self._selector.register(pipe, selectors.EVENT_READ)
        os.set_blocking(self.process.stdin.fileno(), False)

    def send(self, data: bytes, deadline: float) -> None:
        """Write a line; if the program does not read it by the deadline, it is out of time."""
        assert self.process.stdin
        pipe = self.process.stdin.fileno()
        with selectors.DefaultSelector() as ready:
            ready.register(pipe, selectors.EVENT_WRITE)
            while data:
                if not ready.select(max(0.0, deadline - time.monotonic())):
                    raise _Ended("timeout", "out of time")
                try:
                    data = data[os.write(pipe, data) :]
                except BlockingIOError:
                    continue
                except BrokenPipeError:
                    self._gone()

    def receive(self, deadline: float) -> bytes:
        """The next line."""
        while b"\n" not in self._line:
            left = deadline - time.monotonic()
            events = self._selector.select(left) if left > 0 else []
            if not events:
                raise _Ended("timeout", "out of time")
            for key, _ in events:
                data = os.read(key.fd, 65536)
                if key.fileobj is self.process.stderr:
                    self._keep(data)
                    if not data:
                        self._selector.unregister(key.fileobj)
                elif not data:
                    self._gone()
                else:
                    self._line += data
                    if len(self._line) > MAX_LINE:
                        raise _Ended("flooded", "an answer of more than 4 MiB")
        line, _, self._line = self._line.partition(b"\n")
        return line

    def _keep(self, data: bytes) -> None:
        self._written += len(data)
        self.output = (self.output + data)[-KEPT_OUTPUT:]
        if self._written > MAX_OUTPUT:
            raise _Ended("flooded", "more than 1 MiB of output")

    def _gone(self) -> None:
        """The process has closed its pipe: wait for its exit code and read the rest of its output."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(1)
        assert self.process.stderr
        with contextlib.suppress(BlockingIOError, OSError):
            self._keep(os.read(self.process.stderr.fileno(), 65536))
        raise _Ended("crashed", f"ended with code {self.process.returncode}")

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.kill()
        self.process.wait()
        self._drain(time.monotonic() + 1)
        self._selector.close()
        for pipe in (self.process.stdin, self.process.stdout, self.process.stderr):
            assert pipe
            with contextlib.suppress(BrokenPipeError):
                pipe.close()

    def _drain(self, deadline: float) -> None:
        """Read until the pipes end, which shows that the kernel has ended all processes of the sandbox."""
        while self._selector.get_map() and (left := deadline - time.monotonic()) > 0:
            for key, _ in self._selector.select(left):
                if not os.read(key.fd, 65536):
                    self._selector.unregister(key.fileobj)


@contextmanager
def _started(back: Backend, role: str, limits: Limits) -> Iterator[_Sandboxed]:
    """A process that is ready for its job; SandboxFailure if it does not become ready."""
    try:
        with back(role, limits) as start:
            inside = _Sandboxed(start)
    except OSError as error:
        raise SandboxFailure(str(error)) from None
    try:
        try:
            ready = inside.receive(time.monotonic() + START_S)
        except _Ended as end:
            said = inside.output.decode(errors="replace").strip().splitlines()
            raise SandboxFailure(said[-1] if said else f"did not start: {end.why}") from None
        if ready != b'"ready"':
            raise SandboxFailure(f"said {ready[:60]!r} instead of being ready")
        yield inside
    finally:
        inside.kill()


def check(back: Backend, program: str, tests: str, entry: str, setup: str, limits: Limits) -> Verdict:
    """Run `tests` on the function `entry` of `program`; `setup` is trusted code that the tests need too.

    SandboxFailure if the sandbox itself does not work, which says nothing about the program.
    """
    with _started(back, "candidate", limits) as candidate, _started(back, "judge", limits) as judge:
        deadline = time.monotonic() + limits.seconds
        try:
            status, why = _converse(candidate, judge, program, tests, entry, setup, deadline)
        except _Ended as end:
            status, why = end.status, end.why
        return Verdict(status, why, candidate.output.decode(errors="replace"))


def _converse(
    candidate: _Sandboxed,
    judge: _Sandboxed,
    program: str,
    tests: str,
    entry: str,
    setup: str,
    deadline: float,
) -> tuple[str, str]:
    candidate.send(_job(program=program, entry=entry), deadline)
    loaded = candidate.receive(deadline)
    if loaded != b'"loaded"':
        return "broken", _broken(loaded)
    judge.send(_job(setup=setup, tests=tests, entry=entry), deadline)
    while True:
        try:
            said = judge.receive(deadline)
        except _Ended as end:  # an answer of the program ended the tests
            return ("timeout", end.why) if end.status == "timeout" else ("failed", f"the tests {end.why}")
        if said.startswith(b"{"):
            return _ending(said)
        candidate.send(said + b"\n", deadline)
        judge.send(candidate.receive(deadline) + b"\n", deadline)


def _ending(line: bytes) -> tuple[str, str]:
    """Verdict and reason in the judge's last line, which is the tests' own unless they were led astray."""
    try:
        ended = json.loads(line)
        verdict, why = ended["verdict"], ended["why"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return "failed", "the tests ended without a verdict"
    if verdict not in ("passed", "failed", "suspicious"):
        return "failed", "the tests ended without a verdict"
    return verdict, _written(str(why))


def _written(text: str) -> str:
    """The text as a file can hold it: without lone surrogates."""
    return text.encode(errors="replace").decode()


def _broken(line: bytes) -> str:
    """Why a program did not load. The line comes from the program, so it may hold anything."""
    try:
        return _written(str(json.loads(line)["broken"])[:300])
    except (ValueError, KeyError, TypeError, RecursionError):
        return "does not load"


def _job(**parts: Any) -> bytes:
    return json.dumps(parts).encode() + b"\n"


def plain(back: Backend, program: str, tests: str, entry: str, limits: Limits) -> bool:
    """Whether the tests pass with program and tests in one process: the verdict of HumanEval's own script."""
    with _started(back, "plain", limits) as inside:
        deadline = time.monotonic() + limits.seconds
        try:
            inside.send(_job(program=program, tests=tests, entry=entry), deadline)
            return _ending(inside.receive(deadline))[0] == "passed"
        except _Ended:
            return False
