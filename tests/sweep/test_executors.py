"""The loop of a sweep, who makes its steps: workers or jobs by submitit, and what is said at the end."""

import os
import re
import signal
import sys
import threading
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import typer
import worker_steps
from conftest import alive, wait_for

from lorapar_cli import sweep
from stages.errors import ConfigError
from stages.sweep import slurm, steps
from stages.sweep.workers import Workers


@pytest.fixture
def chain(monkeypatch, tmp_path):
    """Three steps, each made from the one before; an artifact is there once its file is."""
    monkeypatch.setattr(steps, "current_artifact", lambda store, step: (tmp_path / step.key).exists())
    nodes = {}
    for number, stage in enumerate(("score", "sft", "rl")):
        step = SimpleNamespace(key=stage, stage=SimpleNamespace(name=stage))
        inputs = list(nodes)[-1:]
        nodes[str(tmp_path), stage, stage] = SimpleNamespace(
            stage=stage, step=step, title=f"step {number}", current=False, inputs=inputs,
            config=SimpleNamespace(root=tmp_path), command=[stage, str(tmp_path / stage)],
        )  # fmt: skip
    return nodes


def workers(make_step, slots=2):
    return Workers([None] * slots, worker_steps.begin, make_step)


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """Submitit's local executor, and a command line that touches its second argument."""
    pytest.importorskip("submitit")
    (tmp_path / "lorapar_cli.py").write_text(
        "import pathlib, sys, time\nprint('at', sys.argv[1:], flush=True)\n"
        "time.sleep(600 if 'wait' in sys.argv else 0)\npathlib.Path(sys.argv[2]).touch()\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{':'.join(sys.path)}")
    monkeypatch.setenv("PYTHONSAFEPATH", "1")  # else this folder's comes first
    settings = {"cluster": "local", "timeout_min": 5, "sft.timeout_min": 7}
    return slurm.Cluster(tmp_path / "jobs", settings, 2)


def statuses(outcomes):
    return {outcome.node.stage: (outcome.status, outcome.code) for outcome in outcomes}


def test_workers_and_jobs_make_the_same_steps_in_order(chain, cluster, tmp_path):
    for executor in (workers(worker_steps.touch), cluster):
        said: list[str] = []
        done = steps.run(chain, executor, tmp_path / "logs", said.append)
        assert statuses(done) == dict.fromkeys(("score", "sft", "rl"), ("done", 0))
        assert [text.split(",")[-1] for text in said if text.startswith("done")][-1] == " 0 left: step 2"
        for stage in ("score", "sft", "rl"):
            (tmp_path / stage).unlink()
    assert "at ['rl'," in (tmp_path / "logs/rl-rl.log").read_text()
    assert cluster.executor._executor.parameters["timeout_min"] == 5  # of rl, after sft's 7


def test_a_step_that_fails_stops_what_needs_it_alone(chain, tmp_path):
    """Also one that ends well and has made another artifact, and one whose process is killed."""
    last = list(chain.values())[-1]
    last.inputs.clear()
    for score, code in ((65, 65), (0, 0), (-signal.SIGKILL, 137)):
        executor = workers(partial(worker_steps.touch, score=score), 1)
        done = steps.run(chain, executor, tmp_path / "logs", lambda _: None)
        assert statuses(done) == {"score": ("failed", code), "sft": ("left out", None), "rl": ("done", 0)}
        (tmp_path / "rl").unlink()


@pytest.mark.parametrize("jobs", [False, True], ids=["workers", "jobs"])
def test_who_stops_a_sweep_stops_its_steps(chain, cluster, tmp_path, jobs):
    list(chain.values())[0].command.append("wait")
    executor = cluster if jobs else workers(worker_steps.wait_for_long)
    log = tmp_path / "logs/score-score.log"
    begun = lambda: log.exists() and log.read_text()  # noqa: E731
    threading.Thread(
        target=lambda: wait_for(begun) and os.kill(os.getpid(), signal.SIGINT), daemon=True
    ).start()
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    with pytest.raises(KeyboardInterrupt):
        steps.run(chain, executor, tmp_path / "logs", lambda _: None)
    started = {child.pid for child in psutil.Process().children(recursive=True)} - before
    assert wait_for(lambda: not any(map(alive, started)))


def test_a_job_at_its_time_limit_runs_the_same_again(tmp_path):
    call = slurm.StepCommand(["sft", "a.yaml"], tmp_path / "log")
    again = call.checkpoint().function
    assert (again.arguments, again.log) == (call.arguments, call.log)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"cluster": "local"}, "timeout_min is missing"),
        ({"timeout_min": 5}, "srun"),
        ({"timeout_min": "1-00:00:00", "cluster": "local"}, "expected type <class .int.>"),
        ({"timeout_min": 5, "cluster": "local", "slurm_tme": 5}, "Unknown argument 'tme'"),
    ],
)
def test_wrong_parameters_are_refused(chain, tmp_path, monkeypatch, settings, said):
    pytest.importorskip("submitit")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match=said):
        slurm.Cluster(tmp_path, settings, 1).submit(list(chain.values())[0], Path("log"))


def test_parameters_of_jobs_are_read_as_settings_are_and_devices_are_those_that_are_visible(monkeypatch):
    read = sweep._parameters(["timeout_min=5", "slurm_setup=[module load cuda]", "rl.mem_gb=8"])
    assert read == {"timeout_min": 5, "slurm_setup": ["module load cuda"], "rl.mem_gb": 8}
    with pytest.raises(ConfigError, match="--slurm timeout_min: expected KEY=VALUE"):
        sweep._parameters(["timeout_min"])
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert sweep._slots(3, None) == [None] * 3 and sweep._slots(None, "0+1,2 + 3") == ["0,1", "2,3"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5")
    assert sweep._slots(None, "4, 5") == ["4", "5"]
    wrong = {"0,5": "0 is not in CUDA_VISIBLE_DEVICES=4,5"}
    wrong |= dict.fromkeys(("0,,1", "0+", "", "0,1+0"), "expected numbers, separated by commas, each once")
    for devices, said in wrong.items():
        with pytest.raises(ConfigError, match=re.escape(f"--devices {devices}: {said}")):
            sweep._slots(None, devices)


def test_the_end_says_what_failed_and_why(tmp_path, capfd):
    def node(stage: str, *cells: tuple[str, int]) -> SimpleNamespace:
        step = SimpleNamespace(name=stage, key="0a1b")
        return SimpleNamespace(step=step, cells=[("t", row, seed) for row, seed in cells])

    log = tmp_path / "rl.log"
    ended = [
        steps.Outcome(node("sft", ("one", 1)), "done", 0, log),
        steps.Outcome(node("rl", ("one", 1), ("two", 2)), "failed", 65, log),
        steps.Outcome(node("eval:rl@demo", ("two", 2)), "left out"),
    ]
    with pytest.raises(typer.Exit) as caught:
        sweep._report_failures(ended, 4)
    said = capfd.readouterr()
    assert caught.value.exit_code == 65 and "2 of 4 cells are not complete" in said.err
    rl, after = said.out.splitlines()[1:]
    assert re.match(r"rl 0a1b +failed +65 +see .*rl.log \(one, seed 1; two, seed 2\)", rl)
    assert re.match(r"eval:rl@demo 0a1b +left out +a step that it needs failed \(two, seed 2\)", after)
