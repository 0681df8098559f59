"""Runs a command and ends it, with all of its children, when its starter ends for whatever reason.

Used as `python process_guard.py COMMAND…` with a pipe as standard input, which closes when the starter ends
or closes it. The guard leads a session of its own, so that signals to the starter's process group or terminal
do not reach it, and the command and its children are in that session. If the guard itself is killed, the
kernel ends the command, and the starter the rest (`Guarded.finish`).
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
from typing import Any

PATIENCE_S = 5
"""Seconds from SIGTERM to SIGKILL."""
PR_SET_PDEATHSIG = 1
TERMINATION_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)


class Guarded(subprocess.Popen[bytes]):
    """A command under a guard, whose exit code is the command's, as a shell has it."""

    def __init__(self, command: list[str], **options: Any) -> None:
        """options: those of Popen."""
        guard = [sys.executable, "-I", "-S", __file__, *command]
        super().__init__(guard, stdin=subprocess.PIPE, start_new_session=True, **options)

    def finish(self) -> int:
        """Wait for the command and return its exit code, 128 + n if signal n ended it.

        If the wait is interrupted, the command is ended before the exception goes on.
        """
        try:
            return shell_exit_code(self.wait())
        finally:  # not `with self`: after an interrupt, Popen's context manager would not wait
            self.end()

    def end(self) -> None:
        """End the command if it still runs, and wait for that."""
        assert self.stdin is not None
        self.stdin.close()
        if self.wait() == -signal.SIGKILL:
            _kill_session(self.pid)


def run(command: list[str], **options: Any) -> int:
    """Run a guarded command and return its exit code; see `Guarded.finish`. options: those of Popen."""
    return Guarded(command, **options).finish()


def shell_exit_code(code: int) -> int:
    """Convert Popen's return code to that of a shell: 128 + n, not -n, for signal n."""
    return code if code >= 0 else 128 - code


def end_with_parent() -> None:
    """Have the kernel kill this process when its parent ends (Linux; see prctl(2))."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _guard(command: list[str]) -> int:
    """Run the command and return its exit code; end it on a signal, or if standard input closes."""
    ignored = {number for number in TERMINATION_SIGNALS if signal.getsignal(number) is signal.SIG_IGN}
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, preexec_fn=end_with_parent)
    ending = threading.Lock()  # acquired once, by the first thread that ends the session

    def end() -> None:
        if not ending.acquire(blocking=False):
            return
        os.killpg(0, signal.SIGTERM)
        deadline = time.monotonic() + PATIENCE_S
        while child.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
        _kill_session(os.getpid())

    def end_at_eof() -> None:
        while os.read(0, 1024):  # not sys.stdin: its lock would abort the interpreter's shutdown
            pass
        end()

    for number in TERMINATION_SIGNALS:
        if number not in ignored:  # batch systems and nohup set some to be ignored
            signal.signal(number, lambda *_: threading.Thread(target=end, daemon=True).start())
    threading.Thread(target=end_at_eof, daemon=True).start()
    code = child.wait()
    _kill_session(os.getpid())  # a server that crashed may leave workers behind
    return shell_exit_code(code)


def _kill_session(leader: int) -> None:
    """Kill all processes of a session but its leader, also those that are started meanwhile."""
    while members := [pid for pid in _processes_of(leader) if pid != leader]:
        for pid in members:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)


def _processes_of(session: int) -> list[int]:
    """The living processes of a session; see proc(5)."""
    members = []
    for name in filter(str.isdecimal, os.listdir("/proc")):
        with contextlib.suppress(OSError), open(f"/proc/{name}/stat", "rb") as file:
            state, _, _, leader = file.read().rpartition(b")")[2].split()[:4]
            if int(leader) == session and state not in b"ZX":
                members.append(int(name))
    return members


if __name__ == "__main__":
    sys.exit(_guard(sys.argv[1:]))
