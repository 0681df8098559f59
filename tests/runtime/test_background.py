"""Calls side by side: the first error is told, and none of the others keeps a process from ending."""

import json
import signal
import subprocess
import sys
import threading
import time

import pytest
from conftest import ROOT
from mock_server import Mock, serve

from stages.runtime import background as module
from stages.runtime.background import in_background


def test_all_calls_are_made_before_the_block_is_left():
    made, stop = [], threading.Event()
    with in_background([lambda n=n: made.append((time.sleep(n / 50), n)) for n in range(3)], stop):
        made.append("block")
    assert sorted(n for _, n in (one for one in made if one != "block")) == [0, 1, 2] and "block" in made
    assert not stop.is_set()


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


def test_a_signal_ends_classify_though_no_server_answers(tiny, tmp_path):
    with serve(Mock(lambda n, path, body: ("hang", 600) if n else None)) as mock:
        (tmp_path / "rows.jsonl").write_text('{"question": "How many?", "answer": "3\\n#### 3"}\n')
        config = {
            "runs_dir": str(tmp_path / "runs"),
            "model": {"name": str(tiny)},
            "data": {"path": str(tmp_path / "rows.jsonl")},
            "eval": {"targets": ["base"]},
            "classify": {"voters": [{"model": "judge", "base_url": mock.url}]},
        }
        (tmp_path / "c.json").write_text(json.dumps(config))
        command = [sys.executable, "-m", "lorapar_cli", "classify", str(tmp_path / "c.json")]
        child = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
        try:
            while len(mock.log) < 2 and child.poll() is None:
                time.sleep(0.05)
            child.send_signal(signal.SIGTERM)
            assert child.wait(120) == 128 + signal.SIGTERM, child.stderr.read()
        finally:
            child.kill()
