"""A guarded process does not outlive its starter, however that, or its guard, ends.

Of calls side by side the first error is told, and none of the others keeps a process from ending.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from conftest import LORAPAR, ROOT, alive, flags, paths, wait_for
from mock_server import Mock, serve

from stages.runtime import background as module
from stages.runtime import process_guard
from stages.runtime.background import in_background

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


def test_all_calls_are_made_before_the_block_is_left():
    calls, stop = [], threading.Event()
    with in_background([lambda n=n: (time.sleep(n / 50), calls.append(n)) for n in range(3)], stop):
        pass
    assert sorted(calls) == [0, 1, 2] and not stop.is_set()


@pytest.mark.parametrize("who", ["call", "block"])
def test_an_error_stops_the_others_and_waits_for_none_that_cannot_stop(monkeypatch, who):
    monkeypatch.setattr(module, "GRACE_S", 0.1)
    stop, deaf, obeyed = threading.Event(), threading.Event(), threading.Event()

    def obeys():
        stop.wait(600)
        obeyed.set()

    def fails():
        if who == "call":
            raise ValueError("told")

    with pytest.raises(ValueError, match="told"), in_background([deaf.wait, obeys, fails], stop):
        if who == "block":
            raise ValueError("told")
    assert obeyed.is_set()
    deaf.set()


def test_a_signal_ends_classify_though_no_server_answers(tiny, demo_data, tmp_path):
    with serve(Mock(lambda n, path, body: ("hang", 600) if n else None)) as mock:
        voters = json.dumps([{"model": "judge", "base_url": mock.url}])
        sets = flags(*paths(tiny, demo_data, tmp_path), f"classify.voters={voters}", "data.limit=1")
        command = [*LORAPAR, "classify", "configs/smoke.yaml", *sets]
        child = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
        try:
            assert wait_for(lambda: len(mock.log) > 1 or child.poll() is not None)
            child.send_signal(signal.SIGTERM)
            assert child.wait(120) == 128 + signal.SIGTERM, child.stderr.read()
        finally:
            child.kill()
