"""Runs a command in its own process group and ends the group when standard input closes.

Standard input also closes when the parent is killed. Used as `python guard.py COMMAND…`; it imports nothing
of lorapar, so that it starts at once.
"""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time

PATIENCE_S = 5


def guarded(command: list[str]) -> list[str]:
    """The command under a guard, which ends it and all of its children when our end of its input closes."""
    return [sys.executable, __file__, *command]


def main(command: list[str]) -> int:
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)

    def end(number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, number)

    def watch() -> None:
        while os.read(0, 1024):  # not sys.stdin: its lock would abort the interpreter's shutdown
            pass
        end(signal.SIGTERM)
        deadline = time.monotonic() + PATIENCE_S
        while child.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
        end(signal.SIGKILL)

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which closes our input
    threading.Thread(target=watch, daemon=True).start()
    code = child.wait()
    end(signal.SIGKILL)  # a server that crashed may leave workers behind
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
