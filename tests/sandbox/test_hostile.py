"""Every hostile program on every back end.

Nothing of the user's changes, nothing leaks, nothing stays, and none outlives its time.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import descendants, no_sandbox
from hostile import CONTAINED, FORGED, PREAMBLE

from stages.sandbox.backends import BACKENDS, Limits
from stages.sandbox.pair import SandboxFailure, check

LIMITS = Limits(seconds=1)
MARK = "secret-7f3a"
GOOD = "def f(): return 42"
TESTS = "def check(f):\n    x = f()\n    assert x == 42 or x == [42] * 3 or x == {'a': (42,)}"


COPY = tempfile.NamedTemporaryFile(prefix="lorapar-", suffix="-landlock.py")
"""landlock.py as it is, but that it takes the kernel's Landlock for version 5 at most."""


@contextlib.contextmanager
def _older(role, limits):
    """Landlock as in kernels to 6.11, which do not keep signals and abstract sockets apart."""
    with BACKENDS["landlock"](role, limits) as start:
        script = next(part for part in start.command if part.endswith("landlock.py"))
        text = Path(script).read_text(encoding="utf-8")
        assert "return max(0, " in text
        Path(COPY.name).write_text(text.replace("return max(0, ", "return min(5, "), encoding="utf-8")
        yield replace(start, command=[COPY.name if part == script else part for part in start.command])


KINDS = {**{name: BACKENDS[name] for name in ("bubblewrap", "landlock")}, "landlock to 6.11": _older}


def _usable(name):
    try:
        return check(KINDS[name], GOOD, TESTS, "f", "", LIMITS).passed
    except SandboxFailure:
        return False


@pytest.fixture
def victim(tmp_path, monkeypatch):
    """What the programs are after, and a look at whether they got it."""
    monkeypatch.setenv("LORAPAR_SECRET", MARK)
    canary, secret, drop = tmp_path / "canary", tmp_path / "secret", tmp_path / "drop"
    canary.write_text("untouched")
    secret.write_text(MARK)
    drop.mkdir()
    canary.chmod(0o644)
    os.utime(canary, (10**9, 10**9))
    tcp, local = socket.socket(), socket.socket(socket.AF_UNIX)
    udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    tcp.bind(("127.0.0.1", 0))
    udp.bind(tcp.getsockname())
    local.bind(f"\0lorapar-{os.getpid()}")
    for listener in (tcp, local):
        listener.listen()
    for listener in (tcp, udp, local):
        listener.setblocking(False)
    # Something other than the tests themselves takes the signals.
    parent = subprocess.Popen(
        [sys.executable, "-c", "import time; time.sleep(10**5)"], env={"LORAPAR_SECRET": MARK}
    )
    names = {"CANARY": canary, "SECRET": secret, "DROP": drop, "PORT": tcp.getsockname()[1]}
    names |= {"SOCKET": f"lorapar-{os.getpid()}", "PARENT": parent.pid}
    state = _state(canary)
    priority = os.getpriority(os.PRIO_PROCESS, 0)

    def look():
        broken = []
        if not canary.exists() or canary.read_text() != "untouched" or _state(canary) != state:
            broken.append("canary")
        if any(drop.iterdir()):
            broken.append("files left")
        for listener in (tcp, udp, local):
            with contextlib.suppress(BlockingIOError):
                broken.append(f"connection {listener.recv(1) if listener is udp else listener.accept()}")
        if parent.poll() is not None:
            broken.append("parent killed")
        now = os.sched_getaffinity(parent.pid), os.getpriority(os.PRIO_PROCESS, parent.pid)
        if now != (os.sched_getaffinity(0), priority):
            broken.append("parent slowed")
        return broken

    yield names, look
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    for listener in (tcp, udp, local):
        listener.close()


def _state(path):
    s = path.stat()
    return s.st_mode, s.st_uid, s.st_mtime, s.st_nlink, os.listxattr(path)


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_hostile_programs_are_contained(name, victim, capsys, tally):
    if not _usable(name):
        tally.skipped = True
        no_sandbox(f"{name} does not work here")
    names, look = victim
    limits_before = os.sched_getaffinity(0)
    escapes, slowest, statuses = [], 0.0, Counter()
    with descendants() as left:
        before = left()
        for family, programs in CONTAINED.items():
            for title, code in programs.items():
                program = f"{PREAMBLE}\n{code}\n{GOOD}"
                for word, value in names.items():
                    program = program.replace(f"${word}", str(value))
                begun = time.monotonic()
                verdict = check(KINDS[name], program, TESTS, "f", "", LIMITS)
                took = time.monotonic() - begun
                slowest = max(slowest, took)
                statuses[verdict.status] += 1
                found = look()
                if MARK in verdict.output or "secret-shadow" in verdict.output:
                    found.append("secret seen")
                if left() - before:
                    found.append("processes left")
                if took > LIMITS.seconds + 1:
                    found.append(f"took {took:.1f} s")
                escapes += [f"{family}: {title}: {what}" for what in found]
    time.sleep(2.5)  # late writers
    escapes += [f"late: {what}" for what in look()]
    assert os.sched_getaffinity(0) == limits_before
    assert check(KINDS[name], GOOD, TESTS, "f", "", LIMITS).passed
    with capsys.disabled():
        user = "root" if os.getuid() == 0 else f"uid {os.getuid()}"
        print(f"\n{name} as {user}: {len(escapes)} escapes, slowest {slowest:.1f} s; {dict(statuses)}")
    tally.tried, tally.lost = statuses.total(), escapes


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bubblewrap", "landlock"])
def test_no_verdict_is_forged(name):
    if not _usable(name):
        no_sandbox(f"{name} does not work here")
    judge = lambda code: check(BACKENDS[name], f"{PREAMBLE}\n{code}", TESTS, "f", "", LIMITS)  # noqa: E731
    verdicts = {title: judge(code) for title, code in FORGED.items()}
    passed = [title for title, verdict in verdicts.items() if verdict.passed]
    assert not passed
    equal = [title for title in FORGED if "equal" in title or title == "mock"]
    assert all(verdicts[title].status == "suspicious" for title in equal)
