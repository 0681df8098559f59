"""Runs a command and ends it, with all of its children, when its starter ends for whatever reason.

Used as `python process_guard.py COMMAND…` with a pipe as standard input, which closes when the starter ends
or closes it. Two processes supervise the command. The guard leads its own session, so that signals to the
starter's process group or terminal do not reach it. The keeper leads the session of the command: if the guard
is killed, the keeper ends the command, and if the keeper is killed, the guard does. If both are killed at
once, the kernel ends the command, but the command's children may live on.
This file imports nothing of lorapar, so that it starts at once.
"""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from typing import IO, Protocol

PATIENCE_S = 5
"""Seconds from SIGTERM to SIGKILL."""
KEEP = "--keep"
PR_SET_PDEATHSIG = 1
TERMINATION_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)


class Waitable(Protocol):
    """Child process to wait for: a Popen or a fork."""

    def poll(self) -> int | None: ...

    def wait(self) -> int: ...


class Child(Waitable, Protocol):
    """Guarded command."""

    @property
    def stdin(self) -> IO[bytes] | None:
        """Pipe whose closing ends the command."""


def guarded_command(command: list[str]) -> list[str]:
    """Wrap a command in a guard, which ends it and all of its children when its standard input closes."""
    return [sys.executable, "-I", "-S", __file__, *command]


def start(
    command: list[str], env: dict[str, str] | None = None, out: IO[bytes] | None = None
) -> subprocess.Popen[bytes]:
    """Start a guarded command. out: file for its stdout and stderr; by default those of this process."""
    return subprocess.Popen(
        guarded_command(command),
        stdin=subprocess.PIPE,
        stdout=out,
        stderr=subprocess.STDOUT if out else None,
        env=env,
    )


def run(command: list[str], env: dict[str, str] | None = None) -> int:
    """Run a guarded command and return its exit code; see `finish`."""
    return finish(start(command, env))


def finish(child: Child) -> int:
    """Wait for a guarded command and return its exit code, 128 + n if signal n ended it.

    If the wait is interrupted, the command is ended before the exception goes on.
    """
    assert child.stdin is not None
    try:
        return shell_exit_code(child.wait())
    finally:  # not `with child`: after an interrupt, Popen's context manager would not wait
        child.stdin.close()
        child.wait()


def guard(command: list[str]) -> int:
    """Run the keeper of a command, and return the exit code."""
    with contextlib.suppress(PermissionError):  # this process leads a session already
        os.setsid()
    keep = [*guarded_command([KEEP]), *command]
    keeper = subprocess.Popen(keep, stdin=subprocess.PIPE, start_new_session=True)
    return shell_exit_code(wait_guarded(keeper, keeper.pid))


def keep(command: list[str]) -> int:
    """Run a command as its keeper, and return the exit code."""
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, preexec_fn=end_with_parent)
    return shell_exit_code(wait_guarded(child, os.getpgrp()))


def shell_exit_code(code: int) -> int:
    """Convert Popen's return code to that of a shell: 128 + n, not -n, for signal n."""
    return code if code >= 0 else 128 - code


def end_with_parent() -> None:
    """Have the kernel kill this process when its parent ends (Linux; see prctl(2))."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def wait_guarded(child: Waitable, group: int) -> int:
    """Wait for the child and return its code.

    Its process group is ended if standard input closes or this process gets a termination signal.
    """
    ending = threading.Lock()  # acquired once, by the first thread that ends the group

    def send_signal(number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(group, number)

    def end_group() -> None:
        if not ending.acquire(blocking=False):
            return
        send_signal(signal.SIGTERM)
        deadline = time.monotonic() + PATIENCE_S
        while child.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
        send_signal(signal.SIGKILL)

    def end_at_eof() -> None:
        while os.read(0, 1024):  # not sys.stdin: its lock would abort the interpreter's shutdown
            pass
        end_group()

    for number in TERMINATION_SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:  # batch systems and nohup set some to be ignored
            signal.signal(number, lambda *_: threading.Thread(target=end_group, daemon=True).start())
    threading.Thread(target=end_at_eof, daemon=True).start()
    code = child.wait()
    # A server that crashed may leave workers behind. The keeper is in their process group, and would kill
    # itself before it returns the exit code. So it leaves them to the guard, unless all are being ended.
    if group != os.getpgrp() or ending.locked():
        send_signal(signal.SIGKILL)
    return code


if __name__ == "__main__":
    if sys.argv[1] == KEEP:
        sys.exit(keep(sys.argv[2:]))
    sys.exit(guard(sys.argv[1:]))
