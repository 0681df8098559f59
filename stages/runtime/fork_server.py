"""Fork server: starts commands as forks of a process that has already imported their libraries.

This saves the seconds that the imports take at each start. `Starter` is the client;
`python -m stages.runtime.fork_server` is the server. A command runs under a guard and a keeper, as with
`process_guard.guarded`: the server's child becomes the guard, the guard's child the keeper, and the keeper's
child the command. They live on if the server ends.

Threads do not survive a fork, and locks that they held stay locked. So the server forks only while it has no
threads, and it is not used on a machine with a GPU, whose driver does not survive a fork either.
"""

from __future__ import annotations

import ctypes
import gc
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
"""Environment of the server: without it the C libraries of numpy and pyarrow start threads when loaded."""
COMMAND_LINE_BYTES = 4096
"""Length of a filler argument of the server. A fork overwrites the server's command line with its own, for
`ps`, and can use no more bytes than the server was started with."""
READY = b"+"


class Fork:
    """Handle of a guarded command that the server has forked, with a subset of the interface of Popen."""

    def __init__(self, stdin: IO[bytes], status: int) -> None:
        """status: read end of the pipe in which the guard leaves the exit code."""
        self.stdin, self._status = stdin, status
        self.returncode: int | None = None

    def poll(self) -> int | None:
        has_ended = self.returncode is None and select.select([self._status], [], [], 0)[0]
        return self.wait() if has_ended else self.returncode

    def wait(self) -> int:
        if self.returncode is None:
            code = os.read(self._status, 16)
            os.close(self._status)
            self.returncode = int(code) if code else -signal.SIGKILL
        return self.returncode


class Starter:
    """Context that starts `python -m PROGRAM …` under a guard, by a fork where possible.

    The server is started with the first command, which waits for the server's imports instead of its own.
    """

    def __init__(self, program: str, modules: Sequence[str]) -> None:
        """modules: modules that the server imports before it forks."""
        self.program, self.modules = program, modules
        self._server: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None

    def start(
        self, arguments: list[str], env: dict[str, str] | None = None, out: IO[bytes] | None = None
    ) -> process_guard.Child:
        """Start a command. out: file for its stdout and stderr; by default those of this process."""
        if self._server_is_ready():
            with suppress(OSError):  # the server was killed
                return self._fork(arguments, env or dict(os.environ), out)
        return process_guard.start([sys.executable, "-m", self.program, *arguments], env, out)

    def _server_is_ready(self) -> bool:
        """Start the server at the first call; False if it cannot fork on this machine, or has failed."""
        if self._server is None and can_fork():
            self._socket, server_end = socket.socketpair()
            command = [sys.executable, "-m", __name__, str(server_end.fileno()), self.program, *self.modules]
            self._server = subprocess.Popen(
                [*command, "-" * COMMAND_LINE_BYTES],
                stdin=subprocess.DEVNULL,
                env=NO_THREADS | os.environ,
                pass_fds=[server_end.fileno()],
                start_new_session=True,
                preexec_fn=process_guard.end_with_parent,
            )
            server_end.close()
            if self._socket.recv(1) != READY:
                self._close()
        return self._socket is not None

    def _fork(self, arguments: list[str], env: dict[str, str], out: IO[bytes] | None) -> Fork:
        assert self._socket is not None
        request = os.memfd_create("request")
        guard_stdin, stdin = os.pipe()
        status, guard_status = os.pipe()
        try:
            os.write(request, json.dumps([arguments, env]).encode())
            streams = [out.fileno(), out.fileno()] if out else [1, 2]
            socket.send_fds(self._socket, [READY], [request, guard_stdin, *streams, guard_status])
            if self._socket.recv(1) != READY:
                raise BrokenPipeError
        except BaseException:
            os.close(stdin)
            os.close(status)
            self._close()
            raise
        finally:
            for descriptor in (request, guard_stdin, guard_status):
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
            self._server.kill()  # it may still be importing
            self._server.wait()


def can_fork() -> bool:
    """True if commands can be forked on this machine: Linux without a GPU."""
    return sys.platform == "linux" and not any(Path(device).exists() for device in GPUS)


class _ForkedChild:
    """Forked child of this process, with the interface that `process_guard.wait_guarded` needs."""

    def __init__(self, pid: int) -> None:
        self.pid = pid

    def poll(self) -> int | None:
        """Return None while the child runs. It is not reaped here: another thread blocks in `wait`."""
        with suppress(ChildProcessError):
            state = os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            return None if state is None else 0
        return 0

    def wait(self) -> int:
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def _serve(requests: socket.socket) -> list[str] | None:
    """Fork for each request. Returns the command's arguments in its process, and None in the server."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # let the kernel reap the guards
    while True:
        _, descriptors, _, _ = socket.recv_fds(requests, 1, 5)
        if not descriptors:
            return None
        if os.fork() == 0:
            requests.sendall(READY)
            requests.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            return _become_command(*descriptors)
        for descriptor in descriptors:
            os.close(descriptor)


def _become_command(request: int, stdin: int, out: int, err: int, status: int) -> list[str]:
    """Turn this fork into the guard and fork the keeper and the command, as process_guard.py does.

    Returns the arguments, in the command's process only; guard and keeper end in here.
    """
    with open(request, "rb") as file:
        file.seek(0)
        arguments, environment = json.load(file)
    for stream, descriptor in enumerate((stdin, out, err)):
        os.dup2(descriptor, stream)
        os.close(descriptor)
    _set_command_line(arguments)
    os.environ.clear()
    os.environ.update(environment)
    os.setsid()
    # The guard never writes to this pipe. The keeper reads end of file from it when the guard ends.
    keeper_stdin, guard_end = os.pipe()
    if keeper := os.fork():
        os.close(keeper_stdin)
        _wait_and_exit(keeper, keeper, status)
    os.setsid()
    os.close(status)
    os.close(guard_end)
    os.dup2(keeper_stdin, 0)
    os.close(keeper_stdin)
    if command := os.fork():
        _wait_and_exit(command, os.getpgrp())
    process_guard.end_with_parent()
    with open(os.devnull, "rb") as null:
        os.dup2(null.fileno(), 0)
    return arguments  # type: ignore[no-any-return]


def _wait_and_exit(child: int, group: int, status: int | None = None) -> NoReturn:
    """Guard the child, then exit with its exit code. status: pipe to which the code is written, too."""
    try:
        code = process_guard.shell_exit_code(process_guard.wait_guarded(_ForkedChild(child), group))
        if status is not None:
            os.write(status, str(code).encode())
        os._exit(code)
    finally:  # the caller is gone; a normal exit would take seconds to unload the libraries
        os._exit(1)


def _set_command_line(arguments: list[str]) -> None:
    """Overwrite the command line of this process, which `ps` and /proc read from its own memory."""
    with suppress(OSError, ValueError, IndexError):
        fields = Path("/proc/self/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        begin, end = int(fields[45]), int(fields[46])  # arg_start and arg_end of proc(5)
        text = "\0".join([sys.executable, "-m", sys.argv[2], *arguments]).encode()[: end - begin - 1]
        ctypes.memmove(begin, text.ljust(end - begin, b"\0"), end - begin)


def _main() -> None:
    requests = socket.socket(fileno=int(sys.argv[1]))
    # What is imported stays: to look through it again and again takes a sixth of the time of importing it.
    gc.disable()
    with libraries.hide_packages(*libraries.UNUSED):
        for name in sys.argv[3:-1]:
            importlib.import_module(name)
    gc.enable()
    if len(os.listdir("/proc/self/task")) > 1:
        return  # the caller then starts its commands itself
    sys.stdout.flush()
    sys.stderr.flush()
    requests.sendall(READY)
    if (arguments := _serve(requests)) is None:
        return
    _reset_inherited_state()
    program = sys.argv[2]
    sys.argv = ["", *arguments]
    runpy.run_module(program, run_name="__main__", alter_sys=True)


def _reset_inherited_state() -> None:
    """Set what a fork inherits but a new process sets up itself: stream buffering and random seeds."""
    stream: Any
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=stream is sys.stderr or stream.isatty())
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed()  # Python's own `random` reseeds itself after a fork


if __name__ == "__main__":
    _main()
