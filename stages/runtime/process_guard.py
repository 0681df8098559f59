"""Runs a command and ends it, with all it has started, when its starter ends, however that happens.

Used as `python guard.py COMMAND…` with a pipe as standard input, which closes when the starter ends or closes
it. Two processes stand by the command. The guard leads a session of its own, so that signals to the starter's
process group or terminal do not reach it. The keeper leads the session of the command: if the guard is
killed, the keeper ends the command, and if the keeper is killed, the guard does. If both are at once, the
kernel ends the command, and what the command has started may live on.
It imports nothing of lorapar, so that it starts at once.
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
KEEP = "--keep"
PR_SET_PDEATHSIG = 1
ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)


class Ending(Protocol):
    """What can be waited for: a Popen, or what was forked."""

    def poll(self) -> int | None: ...

    def wait(self) -> int: ...


class Child(Ending, Protocol):
    """A guarded command."""

    @property
    def stdin(self) -> IO[bytes] | None:
        """It ends when this is closed."""


def guarded(command: list[str]) -> list[str]:
    """The command under a guard, which ends it and all of its children when our end of its input closes."""
    return [sys.executable, "-I", "-S", __file__, *command]


def start(
    command: list[str], env: dict[str, str] | None = None, out: IO[bytes] | None = None
) -> subprocess.Popen[bytes]:
    """Start a guarded command. out: where its output and errors go; ours, if left out."""
    return subprocess.Popen(
        guarded(command),
        stdin=subprocess.PIPE,
        stdout=out,
        stderr=subprocess.STDOUT if out else None,
        env=env,
    )


def run(command: list[str], env: dict[str, str] | None = None) -> int:
    """The exit code of a guarded command; see `finish`."""
    return finish(start(command, env))


def finish(child: Child) -> int:
    """The exit code of a guarded command; it ends with us, and before us if we are interrupted.

    The code is 128 + n if signal n ended it.
    """
    assert child.stdin is not None
    try:
        return code_of(child.wait())
    finally:  # not a `with`: it would not wait after an interrupt
        child.stdin.close()
        child.wait()


def guard(command: list[str]) -> int:
    with contextlib.suppress(PermissionError):  # we lead a session already
        os.setsid()
    keep = [*guarded([KEEP]), *command]
    keeper = subprocess.Popen(keep, stdin=subprocess.PIPE, start_new_session=True)
    return code_of(watched(keeper, keeper.pid))


def keep(command: list[str]) -> int:
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, preexec_fn=end_with_parent)
    return code_of(watched(child, os.getpgrp()))


def code_of(code: int) -> int:
    """As a shell tells it: 128 + n for signal n."""
    return code if code >= 0 else 128 - code


def end_with_parent() -> None:
    """Let the kernel kill this process when its parent ends (Linux; see prctl(2))."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def watched(child: Ending, group: int) -> int:
    """Wait for the child; end its group when our input closes or we are told to end."""
    ending = threading.Lock()

    def end(number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(group, number)

    def finish() -> None:
        if not ending.acquire(blocking=False):
            return
        end(signal.SIGTERM)
        deadline = time.monotonic() + PATIENCE_S
        while child.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
        end(signal.SIGKILL)

    def watch() -> None:
        while os.read(0, 1024):  # not sys.stdin: its lock would abort the interpreter's shutdown
            pass
        finish()

    for number in ENDING:
        if signal.getsignal(number) is not signal.SIG_IGN:  # a batch system's job, or nohup, ignores some
            signal.signal(number, lambda *_: threading.Thread(target=finish, daemon=True).start())
    threading.Thread(target=watch, daemon=True).start()
    code = child.wait()
    # A server that crashed may leave workers behind. The keeper, which is of their group, leaves them to the
    # guard, to give it the exit code, unless all is ending.
    if group != os.getpgrp() or ending.locked():
        end(signal.SIGKILL)
    return code


if __name__ == "__main__":
    if sys.argv[1] == KEEP:
        sys.exit(keep(sys.argv[2:]))
    sys.exit(guard(sys.argv[1:]))
