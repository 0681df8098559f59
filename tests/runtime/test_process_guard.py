"""A guarded process does not outlive its starter, however that, or its guard, ends."""

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
print(os.getppid(), os.getpid(), worker.pid, flush=True)
time.sleep(300)
"""
STARTER = f"""
import subprocess, sys, time
from stages.runtime.process_guard import Guarded
Guarded([sys.executable, "-c", {SERVER!r}]).finish()
"""
ENDS = [(who, number) for who in ("starter", "guard") for number in (signal.SIGTERM, signal.SIGKILL)]


@pytest.mark.parametrize(("who", "number"), [*ENDS, ("group", signal.SIGINT)])
def test_nothing_is_left(who, number):
    """Neither the server nor its worker, which ignores what it can, nor the guard; the starter may go on."""
    starter = subprocess.Popen(
        [sys.executable, "-c", STARTER], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        guard, server, worker = map(int, starter.stdout.readline().split())
        assert all(map(alive, (guard, server, worker)))
        if who == "group":
            os.killpg(starter.pid, number)
        else:
            os.kill({"starter": starter.pid, "guard": guard}[who], number)
        assert wait_for(lambda: not any(map(alive, (guard, server, worker))))
    finally:
        starter.kill()
        starter.wait()


def test_a_crash_leaves_no_worker_and_its_exit_code_is_the_command_s():
    code = f"exec({SERVER.rpartition('time.sleep(300)')[0]!r}); os.kill(os.getpid(), 9)"
    child = process_guard.Guarded([sys.executable, "-c", code], stdout=subprocess.PIPE)
    *_, worker = map(int, child.stdout.readline().split())
    assert child.finish() == 137 and not alive(worker)


def test_a_command_ignores_what_its_starter_ignores_and_nothing_else():
    code = "import signal, sys; sys.exit(sum(n for n in (1, 3, 15) if signal.getsignal(n) is signal.SIG_IGN))"
    assert process_guard.run([sys.executable, "-c", code]) == 0
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert process_guard.run([sys.executable, "-c", code]) == signal.SIGHUP
    finally:
        signal.signal(signal.SIGHUP, before)
