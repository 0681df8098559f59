"""Starts commands as forks of one process that has imported their libraries: seconds of each start are saved.

`Starter` is the caller's side; `python -m stages.runtime.fork_server` is the server. A command has the same
guard and keeper around it as by `guard.guarded`: the server's child becomes the guard, its child the keeper,
and that one's child the command. They live on if the server ends.

Threads do not survive a fork, and what they held stays locked. So the server forks only while it has none,
and it is not used where there is a GPU, whose driver does not survive one either.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Any, NoReturn

from stages.runtime import libraries, process_guard

GPUS = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")
NO_THREADS = {"OPENBLAS_NUM_THREADS": "1", "JE_ARROW_MALLOC_CONF": "background_thread:false"}
"""The server's environment: numpy's and pyarrow's libraries start threads when they are loaded."""
ROOM = 4096
"""Bytes for the command line that `ps` shows of a fork: no more than the server was started with."""
READY = b"+"


class Fork:
    """A guarded command that the server has started, with what is used of a Popen."""

    def __init__(self, stdin: IO[bytes], status: int) -> None:
        """status: a pipe in which the guard leaves the exit code."""
        self.stdin, self._status = stdin, status
        self.returncode: int | None = None

    def poll(self) -> int | None:
        ended = self.returncode is None and select.select([self._status], [], [], 0)[0]
        return self.wait() if ended else self.returncode

    def wait(self) -> int:
        if self.returncode is None:
            code = os.read(self._status, 16)
            os.close(self._status)
            self.returncode = int(code) if code else -signal.SIGKILL
        return self.returncode


class Starter:
    """Starts `python -m PROGRAM …`, guarded; within it commands are forked where that can be done.

    The server is started with the first command, which waits for it as long as its own imports would take.
    """

    def __init__(self, program: str, modules: Sequence[str]) -> None:
        """modules: what the server imports before it forks."""
        self.program, self.modules = program, modules
        self._server: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None

    def start(
        self, arguments: list[str], env: dict[str, str] | None = None, out: IO[bytes] | None = None
    ) -> process_guard.Child:
        """out: where the command's output and errors go; ours, if left out."""
        if self._ready():
            with suppress(OSError):  # the server was killed
                return self._fork(arguments, env or dict(os.environ), out)
        return process_guard.start([sys.executable, "-m", self.program, *arguments], env, out)

    def _ready(self) -> bool:
        if self._server is None and can_fork():
            self._socket, theirs = socket.socketpair()
            command = [sys.executable, "-m", __name__, str(theirs.fileno()), self.program, *self.modules]
            self._server = subprocess.Popen(
                [*command, "-" * ROOM],
                stdin=subprocess.DEVNULL,
                env=NO_THREADS | os.environ,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
                preexec_fn=process_guard.end_with_parent,
            )
            theirs.close()
            if self._socket.recv(1) != READY:
                self._close()
        return self._socket is not None

    def _fork(self, arguments: list[str], env: dict[str, str], out: IO[bytes] | None) -> Fork:
        assert self._socket is not None
        request = os.memfd_create("request")
        alive, stdin = os.pipe()
        status, told = os.pipe()
        try:
            os.write(request, json.dumps([arguments, env]).encode())
            streams = [out.fileno(), out.fileno()] if out else [1, 2]
            socket.send_fds(self._socket, [READY], [request, alive, *streams, told])
            if self._socket.recv(1) != READY:
                raise BrokenPipeError
        except BaseException:
            os.close(stdin)
            os.close(status)
            self._close()
            raise
        finally:
            for descriptor in (request, alive, told):
                os.close(descriptor)
        return Fork(open(stdin, "wb", buffering=0), status)

    def _close(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def __enter__(self) -> Starter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()
        if self._server is not None:
            self._server.kill()  # it may still import
            self._server.wait()


def can_fork() -> bool:
    """Whether commands can be forked here at all."""
    return sys.platform == "linux" and not any(Path(device).exists() for device in GPUS)


class _Forked:
    """A child of this process, with what `guard.watched` asks of it."""

    def __init__(self, pid: int) -> None:
        self.pid = pid

    def poll(self) -> int | None:
        """None while it runs; it is left for `wait`, which another thread is in."""
        with suppress(ChildProcessError):
            ended = os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            return None if ended is None else 0
        return 0

    def wait(self) -> int:
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def _serve(requests: socket.socket) -> list[str] | None:
    """Fork for each request. In a command's process its arguments are returned, in the server None."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for guards
    while True:
        _, descriptors, _, _ = socket.recv_fds(requests, 1, 5)
        if not descriptors:
            return None
        if os.fork() == 0:
            requests.sendall(READY)
            requests.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            return _become(*descriptors)
        for descriptor in descriptors:
            os.close(descriptor)


def _become(request: int, alive: int, out: int, err: int, told: int) -> list[str]:
    """Be the guard, and in its children the keeper and the command, as in guard.py. It alone returns."""
    with open(request, "rb") as file:
        file.seek(0)
        arguments, environment = json.load(file)
    for stream, descriptor in enumerate((alive, out, err)):
        os.dup2(descriptor, stream)
        os.close(descriptor)
    _name(arguments)
    os.environ.clear()
    os.environ.update(environment)
    os.setsid()
    alive, ours = os.pipe()
    if keeper := os.fork():
        os.close(alive)
        _watch(keeper, keeper, told)
    os.setsid()
    os.close(told)
    os.close(ours)
    os.dup2(alive, 0)
    os.close(alive)
    if command := os.fork():
        _watch(command, os.getpgrp())
    process_guard.end_with_parent()
    with open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), 0)
    return arguments  # type: ignore[no-any-return]


def _watch(child: int, group: int, told: int | None = None) -> NoReturn:
    """Stand by the child, and end as it does. told: where its exit code goes, too."""
    try:
        code = process_guard.code_of(process_guard.watched(_Forked(child), group))
        if told is not None:
            os.write(told, str(code).encode())
        os._exit(code)
    finally:  # the starter is gone; to unload what is loaded here would take seconds
        os._exit(1)


def _name(arguments: list[str]) -> None:
    """What `ps` and /proc tell of a process: the arguments that it was started with, in its own memory."""
    with suppress(OSError, ValueError, IndexError):
        fields = Path("/proc/self/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        begin, end = int(fields[45]), int(fields[46])  # arg_start and arg_end of proc(5)
        text = "\0".join([sys.executable, "-m", sys.argv[2], *arguments]).encode()[: end - begin - 1]
        ctypes.memmove(begin, text.ljust(end - begin, b"\0"), end - begin)


def _main() -> None:
    requests = socket.socket(fileno=int(sys.argv[1]))
    with libraries.hidden(*libraries.UNUSED):
        for name in sys.argv[3:-1]:
            importlib.import_module(name)
    if len(os.listdir("/proc/self/task")) > 1:
        return  # the caller then starts its commands itself
    sys.stdout.flush()
    sys.stderr.flush()
    requests.sendall(READY)
    if (arguments := _serve(requests)) is None:
        return
    _fresh()
    program = sys.argv[2]
    sys.argv = ["", *arguments]
    runpy.run_module(program, run_name="__main__", alter_sys=True)


def _fresh() -> None:
    """What a new process has of its own: the buffering of a terminal, and random numbers."""
    stream: Any
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=stream is sys.stderr or stream.isatty())
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed()  # Python's own `random` sees to itself


if __name__ == "__main__":
    _main()
