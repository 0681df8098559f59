"""Self-test of a back end: a good program must pass, and no hostile program may do what it attempts."""

import os
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from string import Template

from stages.sandbox.backends import Limits
from stages.sandbox.pair import Backend, SandboxFailure, check

LIMITS = Limits(seconds=1)
GOOD_LIMITS = Limits(seconds=20)
"""Limits of the good program: generous, so that a busy machine does not make the back end fail."""
GOOD = (
    "import math, collections, re, heapq\n"
    "def f():\n    print('text')\n    return [math.floor(4.2), {'a': (1, 2.5)}]"
)
TESTS = "def check(f):\n    assert f() == [4, {'a': (1, 2.5)}]"

# Each program returns the value that the tests expect only after it has done what the sandbox must prevent.
_GET = "    return [4, {'a': (1, 2.5)}]"
HOSTILE = {
    "write a file": f"def f():\n    open('$FOLDER/file', 'a').write('x')\n{_GET}",
    "delete a file": f"import os\ndef f():\n    os.remove('$FOLDER/file')\n{_GET}",
    "read a file": f"def f():\n    open('$FOLDER/file').read()\n{_GET}",
    "change a file's mode": f"import os\ndef f():\n    os.chmod('$FOLDER/file', 0o777)\n{_GET}",
    "read the caller's environment": f"def f():\n    open('/proc/{os.getpid()}/environ').read(1)\n{_GET}",
    "find the caller's variables": f"import os\ndef f():\n    os.environ['LORAPAR_SELFTEST']\n{_GET}",
    "connect to a port": (
        f"import socket\ndef f():\n    socket.create_connection(('127.0.0.1', $PORT), 1)\n{_GET}"
    ),
    "start a process": f"import os\ndef f():\n    if not os.fork(): os._exit(0)\n{_GET}",
    "run a shell": (
        f"import subprocess\ndef f():\n    subprocess.run(['/bin/sh', '-c', ':'], check=True)\n{_GET}"
    ),
    "signal the caller": f"import os\ndef f():\n    os.kill({os.getpid()}, 0)\n{_GET}",
    "run for ever": f"def f():\n    while True: pass\n{_GET}",
    "take all memory": f"def f():\n    bytearray(2**30)\n{_GET}",
    "equal everything": "class E(list):\n    def __eq__(s, o): return True\ndef f(): return E()",
}


def selftest(backend: Backend) -> list[str]:
    """Return the problems, one line each; an empty list if the back end is safe."""
    try:
        verdict = check(backend, GOOD, TESTS, "f", "", GOOD_LIMITS)
        if not verdict.passed:
            return [f"a good program does not pass: {verdict.status}, {verdict.why}"]
        with _targets() as targets:
            return [
                f"a program could {title}"
                for title, program in HOSTILE.items()
                if check(backend, Template(program).substitute(targets), TESTS, "f", "", LIMITS).passed
            ]
    except SandboxFailure as failure:
        return [str(failure)]


@contextmanager
def _targets() -> Iterator[dict[str, str]]:
    """Create what the hostile programs attack: a file, a listening port and an environment variable."""
    with tempfile.TemporaryDirectory(prefix="lorapar-selftest-") as folder, socket.socket() as listener:
        Path(folder, "file").write_text("untouched", encoding="utf-8")
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        os.environ["LORAPAR_SELFTEST"] = "1"
        try:
            yield {"FOLDER": folder, "PORT": str(listener.getsockname()[1])}
        finally:
            del os.environ["LORAPAR_SELFTEST"]
