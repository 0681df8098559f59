"""A step that does not end ends the run, which says where it stands and for whom the others wait."""

import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, free_port, wait_for

SCRIPT = """
import logging, sys, time
from pathlib import Path
from types import SimpleNamespace
from stages.runtime import distributed
from stages.lora.training import watchdog
logging.basicConfig(format="%(message)s", stream=sys.stderr, force=True)
watchdog.LEAST_S, watchdog.TICK_S, watchdog.SETTLE_S = 0.6, 0.05, 1.0
dog = watchdog.Watchdog(Path(sys.argv[1]))
dog.on_train_begin(None, None, None)
for step in range(1, 6):
    time.sleep(0.01)
    dog.on_step_end(None, SimpleNamespace(global_step=step), None)
print("five steps", flush=True)
def a_reward_that_hangs():
    time.sleep(600)
"""
ALONE = SCRIPT + "a_reward_that_hangs()"
TOGETHER = """
import torch, torch.distributed as dist
import stages.lora.training.watchdog  # takes seconds: before they meet, so that they begin together
dist.init_process_group("gloo")
""" + SCRIPT + """
if distributed.rank() == 1:
    a_reward_that_hangs()
dist.all_reduce(torch.ones(1))
"""  # fmt: skip


def begun(code: str, folder: Path) -> multiprocessing.Process:
    """The code in a forked child, which has the libraries already; what it says is in files of the folder."""
    child = multiprocessing.get_context("fork").Process(target=_child, args=(code, folder))
    child.start()
    return child


def _child(code: str, folder: Path) -> None:
    sys.argv = ["", str(folder)]
    sys.stdout, sys.stderr = ((folder / name).open("w", buffering=1) for name in ("out", "err"))
    exec(compile(code, "a script", "exec"), {})


def test_a_step_that_hangs_ends_the_run_and_says_where(tmp_path):
    child = begun(ALONE, tmp_path)
    child.join()
    said = (tmp_path / "err").read_text()
    assert child.exitcode == 69 and "in a_reward_that_hangs" in said
    told = r"error: step 6 has taken \d+ s, 20 times the median or more\n  hint: where it stands"
    assert re.search(told, said)


def test_a_run_that_was_stopped_for_a_while_has_not_hung(tmp_path):
    child = begun(SCRIPT + "time.sleep(0.3)", tmp_path)
    assert wait_for(lambda: "five steps" in "".join(file.read_text() for file in tmp_path.glob("out")))
    os.kill(child.pid, signal.SIGSTOP)
    time.sleep(1.5)
    os.kill(child.pid, signal.SIGCONT)
    child.join()
    assert child.exitcode == 0 and "stands here" not in (tmp_path / "err").read_text()


@pytest.mark.slow
def test_of_several_processes_the_missing_one_is_named(tmp_path):
    failure = str(tmp_path / "failure.json")
    shared = {"WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    shared |= {"LORAPAR_FAILURE": failure}
    command = [sys.executable, "-c", TOGETHER, str(tmp_path / "beats")]
    children = [
        subprocess.Popen(
            command, cwd=ROOT, stderr=subprocess.PIPE, text=True,
            env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(3)
    ]  # fmt: skip
    said = [child.communicate()[1] for child in children]
    codes = [child.returncode for child in children]
    assert 69 in codes and 0 not in codes, said  # who waits may see first that another has ended
    assert "process 1 stands here" in said[1] and "in a_reward_that_hangs" in said[1]
    assert "in all_reduce" in said[0] and "in a_reward_that_hangs" not in said[0]
    text = (tmp_path / "failure.json").read_text(encoding="utf-8")
    assert "step 6 has taken " in text and ": process 0, 2 waits for process 1" in text
