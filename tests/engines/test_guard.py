"""A guarded process does not outlive its parent, however that ends."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import stages.engines.guard

PARENT = """
import subprocess, sys, time
guard = subprocess.Popen([sys.executable, sys.argv[1], sys.executable, "-c",
    "import subprocess,sys,time; c=subprocess.Popen(['sleep','300']); "
    "print(c.pid, flush=True); time.sleep(300)"],
    stdin=subprocess.PIPE)
time.sleep(300)
"""


def alive(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_grandchildren_end_with_the_parent(number):
    command = [sys.executable, "-c", PARENT, stages.engines.guard.__file__]
    parent = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    pid = int(parent.stdout.readline())
    assert alive(pid)
    os.kill(parent.pid, number)
    parent.wait()
    deadline = time.monotonic() + 15
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not alive(pid)


def test_exit_code_is_the_command_s():
    command = [sys.executable, stages.engines.guard.__file__, sys.executable, "-c", "raise SystemExit(7)"]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as guard:
        assert guard.wait() == 7
