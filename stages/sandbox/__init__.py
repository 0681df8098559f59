"""Sandbox for programs that a model wrote, so that they cannot harm the machine.

`from_settings` returns one. `inside.py` and `landlock.py` run in the sandboxed processes, `pair.py` runs a
program against its tests, and `backends.py` starts the processes. This package needs only the standard
library and `stages.errors`; `inside.py` and `landlock.py` import no file beside them.

What may change: limits, mounts and back ends in `backends.py`, system calls in `.ci/sandbox_filters.py`. What
must stay: program and tests in processes of their own, between which only plain data passes; no path that can
be written; no run at all where a right could not be dropped. An attack goes into `tests/sandbox/hostile.py`,
and `pytest -m slow tests/sandbox` runs them all.
"""

import os
import socket
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from string import Template
from typing import Any

from stages.errors import SandboxError
from stages.sandbox import pair
from stages.sandbox.backends import BACKENDS, Limits
from stages.sandbox.pair import SandboxFailure, Verdict

__all__ = ["Limits", "Sandbox", "SandboxFailure", "backend_problems", "from_settings"]

SELFTEST_LIMITS = Limits(seconds=1)
GOOD_LIMITS = Limits(seconds=20)
"""Limits of the good program: generous, so that a busy machine does not make the back end fail."""
RETURN = "    return [4, {'a': (1, 2.5)}]"
GOOD = f"import math, collections, re, heapq\ndef f():\n    print(math.floor(4.2))\n{RETURN}"
TESTS = "def check(f):\n    assert f() == [4, {'a': (1, 2.5)}]"
HOSTILE = {
    "write a file": "open('$FOLDER/file', 'a').write('x')",
    "delete a file": "import os; os.remove('$FOLDER/file')",
    "read a file": "open('$FOLDER/file').read()",
    "change a file's mode": "import os; os.chmod('$FOLDER/file', 0o777)",
    "read the caller's environment": "open('/proc/$PID/environ').read(1)",
    "find the caller's variables": "import os; os.environ['LORAPAR_SELFTEST']",
    "connect to a port": "import socket; socket.create_connection(('127.0.0.1', $PORT), 1)",
    "start a process": "import os; os.fork() or os._exit(0)",
    "run a shell": "import subprocess; subprocess.run(['/bin/sh', '-c', ':'], check=True)",
    "signal the caller": "import os; os.kill($PID, 0)",
    "run for ever": "while True: pass",
    "take all memory": "bytearray(2**30)",
    "equal everything": "return type('E', (list,), {'__eq__': lambda self, other: True})()",
}
"""What the sandbox must prevent → what a function does, before it returns what the tests expect."""

SAFE = ("bubblewrap", "landlock")
HINT = (
    "install bubblewrap (apt install bubblewrap); on Ubuntu 23.10 or later also: sysctl -w "
    "kernel.apparmor_restrict_unprivileged_userns=0; see lorapar doctor. Without one, at your own risk: "
    "--set eval.sandbox.backend=unsafe-no-sandbox, or rl. in place of eval."
)


class Sandbox:
    """Back end with limits. `name` is `bubblewrap`, `landlock` or `unsafe-no-sandbox`."""

    def __init__(self, name: str, limits: Limits) -> None:
        self.name, self.limits = name, limits

    def check(self, program: str, tests: str, entry: str, setup: str = "") -> Verdict:
        """Run `tests` on the function `entry` of `program`; `setup` is trusted code that the tests need too.

        SandboxFailure if the sandbox itself fails twice.
        """
        try:
            return pair.check(BACKENDS[self.name], program, tests, entry, setup, self.limits)
        except SandboxFailure:
            return pair.check(BACKENDS[self.name], program, tests, entry, setup, self.limits)

    def check_in_one_process(self, program: str, tests: str, entry: str) -> bool:
        """True if the tests pass with program and tests in one process, as in HumanEval's own script."""
        return pair.plain(BACKENDS[self.name], program, tests, entry, self.limits)


def selftest(backend: pair.Backend) -> list[str]:
    """Return the problems, one line each; an empty list if the back end is safe."""
    try:
        verdict = pair.check(backend, GOOD, TESTS, "f", "", GOOD_LIMITS)
        if not verdict.passed:
            return [f"a good program does not pass: {verdict.status}, {verdict.why}"]
        with _targets() as targets:
            attacks = {title: Template(attack).substitute(targets) for title, attack in HOSTILE.items()}
            programs = {title: f"def f():\n    {attack}\n{RETURN}" for title, attack in attacks.items()}
            verdicts = {
                title: pair.check(backend, program, TESTS, "f", "", SELFTEST_LIMITS)
                for title, program in programs.items()
            }
            return [f"a program could {title}" for title, verdict in verdicts.items() if verdict.passed]
    except SandboxFailure as failure:
        return [str(failure)]


@contextmanager
def _targets() -> Iterator[dict[str, str]]:
    """Create what is attacked: a file, a listening port, and an environment variable of this process."""
    with tempfile.TemporaryDirectory(prefix="lorapar-selftest-") as folder, socket.socket() as listener:
        Path(folder, "file").write_text("untouched", encoding="utf-8")
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        os.environ["LORAPAR_SELFTEST"] = "1"
        try:
            yield {"FOLDER": folder, "PORT": str(listener.getsockname()[1]), "PID": str(os.getpid())}
        finally:
            del os.environ["LORAPAR_SELFTEST"]


def backend_problems() -> dict[str, list[str]]:
    """Test each safe back end on this machine. Returns its problems, one line each; an empty list if none."""
    return {name: selftest(BACKENDS[name]) for name in SAFE}


def from_settings(section: Any, say: Callable[[str], None]) -> Sandbox:
    """Return the sandbox that a SandboxSection selects; `auto` takes the first safe one that works here.

    SandboxError if none passes its self-test.
    """
    name, limits = section.backend, Limits(section.seconds)
    if name == "refuse":
        raise SandboxError(
            "code that a model wrote would run here, and sandbox.backend is refuse", "choose auto"
        )
    if name == "unsafe-no-sandbox":
        say("warning: code that a model wrote runs WITHOUT a sandbox: it can do whatever you can")
        return Sandbox(name, limits)
    reasons = []
    for candidate in SAFE if name == "auto" else [name]:
        problems = selftest(BACKENDS[candidate])
        if not problems:
            return Sandbox(candidate, limits)
        reasons.append(f"{candidate}: {problems[0]}")
    raise SandboxError(f"no sandbox works here ({'; '.join(reasons)})", HINT)
