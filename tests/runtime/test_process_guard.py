"""A guarded process does not outlive its starter, however that, or one of its guards, ends."""

import os
import signal
import subprocess
import sys

import pytest
from conftest import alive, wait_for

from stages.runtime import process_guard

SERVER = """
import os, signal, subprocess, sys, time
worker = subprocess.Popen([sys.executable, "-c", "import signal, time; "
    "[signal.signal(n, signal.SIG_IGN) for n in (1, 2, 3, 15)]; print('up', flush=True); time.sleep(300)"],
    stdout=subprocess.PIPE)
worker.stdout.readline()
keeper = os.getppid()
outer = int(open(f"/proc/{keeper}/stat").read().rsplit(")", 1)[1].split()[1])
print(outer, keeper, os.getpid(), worker.pid, flush=True)
time.sleep(300)
"""
STARTER = f"""
import subprocess, sys, time
from stages.runtime.process_guard import guarded_command
child = subprocess.Popen(guarded_command([sys.executable, "-c", {SERVER!r}]), stdin=subprocess.PIPE)
time.sleep(300)
"""


NUMBERS = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGKILL]
WAYS = [(who, number) for who in ("starter", "group", "guard", "keeper") for number in NUMBERS]


@pytest.mark.parametrize(
    ("who", "number"), [*WAYS, ("both", signal.SIGKILL)], ids=lambda x: getattr(x, "name", x)
)
def test_nothing_is_left(who, number):
    """Neither the server nor its worker, which ignores what it can, nor a guard; the starter may go on."""
    starter = subprocess.Popen(
        [sys.executable, "-c", STARTER], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        outer, keeper, server, worker = map(int, starter.stdout.readline().split())
        assert all(map(alive, (outer, keeper, server, worker)))
        if who == "group":
            os.killpg(starter.pid, number)
        elif who == "both":
            os.kill(outer, signal.SIGSTOP)  # so that it cannot act before it is killed, too
            os.kill(keeper, number)
            os.kill(outer, number)
        else:
            os.kill({"starter": starter.pid, "guard": outer, "keeper": keeper}[who], number)
        left = [outer, keeper, server] if who == "both" else [outer, keeper, server, worker]
        assert wait_for(lambda: not any(map(alive, left)))
    finally:
        starter.kill()
        starter.wait()
        if who == "both":
            os.kill(worker, signal.SIGKILL)


@pytest.mark.parametrize(
    ("code", "seen"), [("raise SystemExit(7)", 7), ("import os; os.kill(os.getpid(), 9)", 137)]
)
def test_exit_code_is_the_command_s(code, seen):
    assert process_guard.run([sys.executable, "-c", code]) == seen


def test_a_command_ignores_what_its_starter_ignores_and_nothing_else():
    code = "import signal, sys; sys.exit(sum(n for n in (1, 3, 15) if signal.getsignal(n) is signal.SIG_IGN))"
    assert process_guard.run([sys.executable, "-c", code]) == 0
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert process_guard.run([sys.executable, "-c", code]) == signal.SIGHUP
    finally:
        signal.signal(signal.SIGHUP, before)
