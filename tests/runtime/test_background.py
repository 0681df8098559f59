"""Calls side by side: the first error is told, and none of the others keeps a process from ending."""

import json
import signal
import subprocess
import sys
import threading
import time

import pytest
from conftest import ROOT, flags, paths, wait_for
from mock_server import Mock, serve

from stages.runtime import background as module
from stages.runtime.background import in_background


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
        config = str(ROOT / "configs/smoke.yaml")
        command = [sys.executable, "-m", "lorapar_cli", "classify", config, *sets]
        child = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
        try:
            assert wait_for(lambda: len(mock.log) > 1 or child.poll() is not None)
            child.send_signal(signal.SIGTERM)
            assert child.wait(120) == 128 + signal.SIGTERM, child.stderr.read()
        finally:
            child.kill()
