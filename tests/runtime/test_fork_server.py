"""A forked command is as one that was started: alone in its session, guarded, with its own streams."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_process_guard import alive

from lorapar_cli.stage_starter import MODULES
from stages.runtime import fork_server, process_guard
from stages.runtime.fork_server import Fork, Starter

PROGRAM = """
import json, os, random, signal, sys
if __name__ == "__main__":
    what = sys.argv[1]
    if what == "facts":
        import heavy
        print(json.dumps({
            "arguments": sys.argv[1:], "name": __spec__.name, "folder": os.getcwd(),
            "mark": os.environ["MARK"], "stdin": sys.stdin.read(),
            "leads": os.getsid(0) == os.getpgrp() != os.getpid(),
            "ignored": [n for n in (1, 2, 3, 15, 17) if signal.getsignal(n) is signal.SIG_IGN],
            "shown": open("/proc/self/cmdline").read().rstrip("\\0").split("\\0")[1:],
            "open": len(os.listdir("/proc/self/fd")), "path": sys.path}))
        print(f"loaded by {heavy.PID}, drawn {random.random()}", file=sys.stderr)
    elif what == "exit":
        sys.exit(int(sys.argv[2]))
    elif what == "kill":
        os.kill(os.getpid(), int(sys.argv[2]))
"""


@pytest.fixture
def program(tmp_path, monkeypatch):
    """A program to be started, and what it imports; both in a folder of their own."""
    (tmp_path / "asked.py").write_text(PROGRAM)
    (tmp_path / "heavy.py").write_text("import os\nPID = os.getpid()")
    monkeypatch.setenv(
        "PYTHONPATH", os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    )
    monkeypatch.setenv("PYTHONSAFEPATH", "1")
    return tmp_path


def facts(starter, folder, **more):
    with (folder / "log").open("w+b") as log:
        child = starter.start(["facts", "--set", "a b"], os.environ | {"MARK": "x"}, log, **more)
        assert process_guard.finish(child) == 0
        log.seek(0)
        first, last = log.read().decode().splitlines()
    return json.loads(first), last


def test_a_fork_is_like_a_process_that_was_started(program, monkeypatch):
    with Starter("asked", ["heavy"]) as starter:
        forked, one = facts(starter, program)
        _, other = facts(starter, program)
        assert one.split(",")[0] == other.split(",")[0] and one != other  # one import, and two draws
        monkeypatch.setattr(fork_server, "can_fork", lambda: False)
        with Starter("asked", ["heavy"]) as plain:
            started, _ = facts(plain, program)
    assert forked == started
    assert forked["shown"] == ["-m", "asked", "facts", "--set", "a b"] and forked["leads"]


@pytest.mark.slow  # it loads all libraries
def test_the_stages_libraries_bring_no_thread_and_nothing_that_is_only_installed(program):
    (program / "asked.py").write_text(
        "import os, sys; print(len(os.listdir('/proc/self/task')), 'torch' in sys.modules,"
        " *{'vllm', 'bitsandbytes', 'sklearn', 'openai'} & sys.modules.keys())"
    )
    with Starter("asked", MODULES) as starter, (program / "log").open("w+b") as log:
        child = starter.start([], out=log)
        assert isinstance(child, Fork) and process_guard.finish(child) == 0
        log.seek(0)
        assert log.read().split() == [b"1", b"True"]


@pytest.mark.parametrize(
    ("arguments", "code"), [(["exit", "0"], 0), (["exit", "7"], 7), (["kill", "9"], 137)]
)
def test_the_exit_code_is_the_command_s(program, arguments, code):
    with Starter("asked", ["heavy"]) as starter:
        assert process_guard.finish(starter.start(arguments)) == code


@pytest.mark.parametrize("modules", [["no_such_module"], ["threaded"]])
def test_what_cannot_be_forked_is_started(program, modules):
    """The server cannot import what it should, or has a thread afterwards."""
    (program / "threaded.py").write_text(
        "import threading, time\nthreading.Thread(target=time.sleep, args=(9,), daemon=True).start()"
    )
    with Starter("asked", modules) as starter:
        assert isinstance(starter.start(["exit", "0"]), subprocess.Popen)
        assert process_guard.finish(starter.start(["exit", "7"])) == 7


def test_commands_live_on_without_the_server_and_the_next_one_is_started(program):
    with Starter("asked", ["heavy"]) as starter:
        first = starter.start(["exit", "7"])
        os.kill(starter._server.pid, signal.SIGKILL)
        starter._server.wait()
        assert process_guard.finish(first) == 7
        assert process_guard.finish(starter.start(["exit", "8"])) == 8


STARTER = """
import sys, time
from stages.runtime.fork_server import Starter
with Starter("server", ["os"]) as starter:
    child = starter.start([])
    child.wait() if "waits" in sys.argv else time.sleep(300)
"""
SERVER = """
import os, signal, subprocess, sys, time
worker = subprocess.Popen([sys.executable, "-c", "import signal, time; "
    "[signal.signal(n, signal.SIG_IGN) for n in (1, 2, 3, 15)]; print('up', flush=True); time.sleep(300)"],
    stdout=subprocess.PIPE)
worker.stdout.readline()
parent = lambda pid: int(open(f"/proc/{pid}/stat").read().rsplit(")", 1)[1].split()[1])
keeper = os.getppid()
print(parent(parent(keeper)), parent(keeper), keeper, os.getpid(), worker.pid, flush=True)
time.sleep(300)
"""
WAYS = [("starter", n) for n in (signal.SIGTERM, signal.SIGINT, signal.SIGKILL)]
WAYS += [(who, n) for who in ("guard", "keeper") for n in (signal.SIGTERM, signal.SIGKILL)]


@pytest.mark.parametrize(("who", "number"), WAYS, ids=lambda x: getattr(x, "name", x))
def test_nothing_is_left(program, who, number):
    """Neither the command nor its worker, which ignores what it can, nor a guard, nor the server."""
    (program / "server.py").write_text(SERVER)
    starter = subprocess.Popen(
        [sys.executable, "-c", STARTER, *(["waits"] if who != "starter" else [])],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        cwd=Path(__file__).parent.parent.parent,
    )
    try:
        server, outer, keeper, command, worker = map(int, starter.stdout.readline().split())
        assert all(map(alive, (server, outer, keeper, command, worker)))
        os.kill({"starter": starter.pid, "guard": outer, "keeper": keeper}[who], number)
        left = [server, outer, keeper, command, worker]
        deadline = time.monotonic() + 15
        while any(map(alive, left)) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not any(map(alive, left))
    finally:
        starter.kill()
        starter.wait()
