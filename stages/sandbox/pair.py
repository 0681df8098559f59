"""Runs a program and its tests in separate sandboxes, and relays the calls between them."""

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
from typing import Any, NoReturn

from stages.sandbox.backends import ENVIRONMENT, ChildProcess, Limits
from stages.sandbox.inside import MAX_LINE

START_S = 30
"""Seconds within which a sandbox must be ready; enough even on a busy machine."""
MAX_OUTPUT = 2**20
"""Bytes of output that a program may write."""
OUTPUT_TAIL = 4096
"""Bytes of output that a Verdict keeps, from its end."""

Backend = Callable[[str, Limits], AbstractContextManager[ChildProcess]]


class SandboxFailure(Exception):
    """The sandbox itself failed, which says nothing about the program."""


@dataclass(frozen=True)
class Verdict:
    """Outcome of a program's tests."""

    status: str
    """passed, failed, suspicious (a result is not plain data), timeout, broken (does not load), crashed, or
    flooded (too much output)."""
    why: str
    output: str
    """End of the program's output, at most OUTPUT_TAIL bytes."""

    @property
    def passed(self) -> bool:
        return self.status == "passed"


class _RunEnded(Exception):
    """A process has ended, hangs or writes too much. Carries the status and reason of a Verdict."""

    def __init__(self, status: str, why: str) -> None:
        super().__init__(status)
        self.status, self.why = status, why


class _SandboxedProcess:
    """Process in a sandbox, with which lines are exchanged until its `deadline`.

    `output` is the end of its standard error.
    """

    def __init__(self, child: ChildProcess) -> None:
        self.process = subprocess.Popen(
            child.command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=ENVIRONMENT,
            pass_fds=child.files,
            start_new_session=True,
            cwd="/",
        )
        self.deadline = time.monotonic() + START_S
        self._unread = b""
        self._output_bytes, self.output = 0, b""
        self._selector = selectors.DefaultSelector()
        assert self.process.stdin and self.process.stdout and self.process.stderr
        self._stdin, self._stderr = self.process.stdin, self.process.stderr
        self._pipes = (self._stdin, self.process.stdout, self._stderr)
        for pipe in self._pipes:
            os.set_blocking(pipe.fileno(), False)
        for pipe in self._pipes[1:]:
            self._selector.register(pipe, selectors.EVENT_READ)

    def send(self, message: bytes) -> None:
        """Write a line, which the process has to read before the deadline."""
        pipe, line = self._stdin.fileno(), message + b"\n"
        with selectors.DefaultSelector() as ready:
            ready.register(pipe, selectors.EVENT_WRITE)
            while line:
                if not ready.select(max(0.0, self.deadline - time.monotonic())):
                    raise _RunEnded("timeout", "ran out of time")
                try:
                    line = line[os.write(pipe, line) :]
                except BlockingIOError:
                    continue
                except BrokenPipeError:
                    self._raise_crashed()

    def receive(self) -> bytes:
        """Read the next line, and meanwhile the output."""
        while b"\n" not in self._unread:
            remaining = self.deadline - time.monotonic()
            events = self._selector.select(remaining) if remaining > 0 else []
            if not events:
                raise _RunEnded("timeout", "ran out of time")
            for key, _ in events:
                chunk = _read(key.fd)
                if chunk is None:
                    continue
                if key.fileobj is self._stderr:
                    self._append_output(chunk)
                    if not chunk:
                        self._selector.unregister(key.fileobj)
                elif not chunk:
                    self._raise_crashed()
                else:
                    self._unread += chunk
                    if len(self._unread) > MAX_LINE:
                        raise _RunEnded("flooded", "sent an answer of more than 4 MiB")
        line, _, self._unread = self._unread.partition(b"\n")
        return line

    def _append_output(self, chunk: bytes) -> None:
        self._output_bytes += len(chunk)
        self.output = (self.output + chunk)[-OUTPUT_TAIL:]
        if self._output_bytes > MAX_OUTPUT:
            raise _RunEnded("flooded", "wrote more than 1 MiB of output")

    def _raise_crashed(self) -> NoReturn:
        """Wait for the exit code of a process that closed its pipe, read its last output, and raise."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(1)
        with contextlib.suppress(OSError):
            self._append_output(_read(self._stderr.fileno()) or b"")
        raise _RunEnded("crashed", f"ended with code {self.process.returncode}")

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.kill()
        self.process.wait()
        # Only when the pipes close, the kernel has ended all processes of the sandbox.
        deadline = time.monotonic() + 1
        while self._selector.get_map() and (remaining := deadline - time.monotonic()) > 0:
            for key, _ in self._selector.select(remaining):
                if _read(key.fd) == b"":
                    self._selector.unregister(key.fileobj)
        self._selector.close()
        for pipe in self._pipes:
            with contextlib.suppress(BrokenPipeError):
                pipe.close()


def _read(pipe: int) -> bytes | None:
    """Read what is there; None if nothing is, after all: a program can read the pipe that it writes to."""
    try:
        return os.read(pipe, 65536)
    except BlockingIOError:
        return None


@contextmanager
def _sandboxed(backend: Backend, role: str, limits: Limits) -> Iterator[_SandboxedProcess]:
    """Start a process and wait until it is ready for its job; SandboxFailure if it does not get ready."""
    try:
        with backend(role, limits) as child:
            process = _SandboxedProcess(child)
    except OSError as error:
        raise SandboxFailure(str(error)) from None
    try:
        try:
            greeting = process.receive()
        except _RunEnded as end:
            lines = process.output.decode(errors="replace").strip().splitlines()
            raise SandboxFailure(lines[-1] if lines else f"did not start: {end.why}") from None
        if greeting != b'"ready"':
            raise SandboxFailure(f"said {greeting[:60]!r} instead of being ready")
        process.deadline = time.monotonic() + limits.seconds
        yield process
    finally:
        process.kill()


def check(backend: Backend, program: str, tests: str, entry: str, setup: str, limits: Limits) -> Verdict:
    """Run `tests` on the function `entry` of `program`; `setup` is trusted code that the tests need too.

    SandboxFailure if the sandbox itself does not work.
    """
    with _sandboxed(backend, "candidate", limits) as candidate, _sandboxed(backend, "judge", limits) as judge:
        candidate.deadline = judge.deadline  # that of the process which started last
        try:
            candidate.send(_job(program=program, entry=entry))
            loaded = candidate.receive()
            if loaded == b'"loaded"':
                judge.send(_job(setup=setup, tests=tests, entry=entry))
                status, why = _relay_calls(candidate, judge)
            else:
                status, why = "broken", _encodable(str(_parsed(loaded).get("broken", "does not load"))[:300])
        except _RunEnded as end:
            status, why = end.status, end.why
        return Verdict(status, why, candidate.output.decode(errors="replace"))


def _relay_calls(candidate: _SandboxedProcess, judge: _SandboxedProcess) -> tuple[str, str]:
    """Relay each call of the tests to the program, and its answer back; the verdict's status and why."""
    while True:
        try:
            message = judge.receive()
        except _RunEnded as end:  # the program's last answer made the tests crash or hang
            return ("timeout", end.why) if end.status == "timeout" else ("failed", f"the tests {end.why}")
        if message.startswith(b"{"):  # an object is the verdict, a list is a call
            return _parse_verdict(message)
        candidate.send(message)
        judge.send(candidate.receive())


def _parse_verdict(line: bytes) -> tuple[str, str]:
    """Status and reason from the judge's last line, which may hold anything if the tests misbehave."""
    message = _parsed(line)
    if message.get("verdict") not in ("passed", "failed", "suspicious"):
        return "failed", "the tests ended without a verdict"
    return message["verdict"], _encodable(str(message.get("why")))


def _parsed(line: bytes) -> dict[str, Any]:
    """Parse a line that may hold anything; empty if it is no object."""
    try:
        message = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return message if isinstance(message, dict) else {}


def _encodable(text: str) -> str:
    """Replace lone surrogates, so that the text can be written to a UTF-8 file."""
    return text.encode(errors="replace").decode()


def _job(**fields: Any) -> bytes:
    return json.dumps(fields).encode()


def plain(backend: Backend, program: str, tests: str, entry: str, limits: Limits) -> bool:
    """True if the tests pass with program and tests in one process, as in HumanEval's own script.

    A program can claim so itself: nothing in that process is out of its reach.
    """
    with _sandboxed(backend, "plain", limits) as process:
        try:
            process.send(_job(program=program, tests=tests, entry=entry))
            return _parse_verdict(process.receive())[0] == "passed"
        except _RunEnded:
            return False
