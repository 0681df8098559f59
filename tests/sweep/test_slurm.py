"""Steps as Slurm jobs: what is submitted, what a second call does, and a real one-node Slurm."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT, wait_for

from stages import ORDER
from stages.errors import ConfigError, MissingInputError, ServerError
from stages.runtime.process_guard import Guarded
from stages.sweep import graph, slurm
from stages.sweep.table import table

pytest.importorskip("submitit")

FILE = """
title: Two masks
base: base.yaml
rows: {one: {partition.theta: 0.9}, two: {partition.theta: 0.5}}
seeds: [1]
columns: {RL: rl@demo}
"""
BASE = """
extends: ROOT/configs/smoke.yaml
runs_dir: HERE/runs
model: {name: MODEL}
data: {path: DATA/train.jsonl, limit: 48}
rl:
  {max_steps: 60, save_steps: 1, num_train_epochs: 99, max_zero_signal_steps: 999,
  rewards_file: HERE/slow.py, rewards: {slow: 1}}
sft: {max_steps: 2}
classify: {strategy: random}
eval: {benchmarks: {demo: {path: DATA/test.jsonl}}}
"""
# RL takes 30 seconds at least, so that no machine is fast enough to end it before it is interrupted.
SLOW = """
import time

def slow(completions, **_):
    time.sleep(0.5)
    return [0.0] * len(completions)
"""


@pytest.fixture
def path(tiny, demo_data, tmp_path) -> Path:
    """A table file; beside it the settings of its jobs."""
    base = BASE
    for name, value in {"ROOT": ROOT, "HERE": tmp_path, "MODEL": tiny, "DATA": demo_data}.items():
        base = base.replace(name, str(value))
    (tmp_path / "base.yaml").write_text(base)
    (tmp_path / "slow.py").write_text(SLOW)
    (tmp_path / "table.yaml").write_text(FILE)
    settings = "default: {partition: all, time: 20, cpus_per_task: 1}\nrl: {time: 60}\n"
    (tmp_path / "slurm.yaml").write_text(settings)
    return tmp_path / "table.yaml"


@pytest.fixture
def sweep(path, lorapar):
    return lambda *options: lorapar("sweep", path, "--slurm", path.with_name("slurm.yaml"), *options)


@pytest.fixture
def submitted(monkeypatch):
    """What is submitted to a Slurm that starts nothing: settings and command of each job; and its queue."""
    import submitit

    seen = SimpleNamespace(jobs=[], queue={})

    class Executor:
        def __init__(self, folder, max_num_timeout):
            self.given = {}

        def update_parameters(self, **given):
            assert given.keys() <= submitit.SlurmExecutor._valid_parameters(), given
            self.given = given

        def submit(self, call):
            number = str(len(seen.jobs) + 100)
            seen.jobs.append((self.given, call.command))
            seen.queue[number, self.given["job_name"]] = "PENDING"
            return SimpleNamespace(job_id=number)

        _valid_parameters = submitit.SlurmExecutor._valid_parameters

    monkeypatch.setattr(submitit, "SlurmExecutor", Executor)
    monkeypatch.setattr(slurm, "queued", lambda: dict(seen.queue))
    return seen


def test_gpus_that_a_stage_would_not_use_are_refused(path, sweep, submitted):
    path.with_name("slurm.yaml").write_text("default: {partition: all, time: 20, gpus_per_node: 8}\n")
    done = sweep()
    assert done.code == 78 and "a job of score has 8 GPUs (gpus_per_node), and score uses one" in done.err
    assert not submitted.jobs


def test_each_job_waits_for_those_that_make_its_inputs(path, sweep, submitted):
    done = sweep()
    assert done.code == 0 and "13 steps are queued or running" in done.err, done.err
    nodes = graph.build_graph(table(path).cells)
    number = {"/".join(place): str(100 + i) for i, place in enumerate(nodes)}
    assert json.loads((path.parent / "runs/sweeps/jobs.json").read_text()) == number
    for node, (given, command) in zip(nodes.values(), submitted.jobs, strict=True):
        wanted = [number["/".join(place)] for place in node.inputs]
        assert given.get("dependency", "") == (f"afterok:{':'.join(wanted)}" if wanted else "")
        assert command == node.command and given["partition"] == "all"
        assert given["time"] == (60 if node.stage == "rl" else 20)
        assert given["additional_parameters"] == {"kill-on-invalid-dep": "yes"}


def test_one_config_runs_as_jobs_in_its_own_folder(path, lorapar, submitted):
    """Its artifacts are those of a run here; what is current gets no job."""
    base, settings = path.with_name("base.yaml"), path.with_name("slurm.yaml")
    done = lorapar("run", base, "--slurm", settings, "--to", "sft")
    assert done.code == 0 and "4 steps are queued or running" in done.err, done.err
    stages = [command[0] for _, command in submitted.jobs]
    assert stages == ["classify", "score", "partition", "sft"] and "eval.engine" not in done.err
    folder = path.parent / "runs/smoke"
    record = json.loads((path.parent / "runs/sweeps/jobs.json").read_text())
    assert {Path(name).parents[1] for name in record} == {folder}
    again = lorapar("run", base, "--slurm", settings, "--to", "sft", "--dry-run")
    assert again.code == 0 and "4 pending" in again.err
    assert lorapar("run", base, "--slurm", settings, "--from", "sft").code == 78
    assert "--dry-run goes with --slurm" in lorapar("run", base, "--dry-run").err
    settings.write_text("default: {time: 20, nodes: 8}\n", encoding="utf-8")
    refused = lorapar("run", base, "--slurm", settings, "--dry-run")
    assert refused.code == 78 and "default.nodes: a job has one node" in refused.err


def test_auto_is_evaluated_with_the_answers_that_it_chooses_from(path):
    path.write_text(FILE.replace("RL: rl@demo", "Auto: auto@demo"))
    base = path.with_name("base.yaml")
    base.write_text(base.read_text().replace("eval: {", "eval: {targets: [sft, rl, auto], "))
    nodes = graph.build_graph(table(path).cells).values()
    commands = [node.command for node in nodes if node.step.name == "eval:auto@demo"]
    assert commands and all("eval.targets=[sft, rl, auto]" in command for command in commands)


def test_what_is_queued_stays_and_what_has_gone_is_submitted_again(path, sweep, submitted, monkeypatch):
    sweep()
    assert "job 100 is pending" in sweep().err and len(submitted.jobs) == 13
    nodes = list(graph.build_graph(table(path).cells).values())
    at = next(i for i, node in enumerate(nodes) if node.step.name == "sft")
    after = [i for i, node in enumerate(nodes) if i == at or {nodes[at].id} & above(node, nodes)]
    for number, name in list(submitted.queue):
        if number == str(100 + at):
            del submitted.queue[number, name]
    cancelled = []
    monkeypatch.setattr(slurm.subprocess, "run", lambda command, **_: cancelled.append(command))
    again = sweep()
    assert f"job {100 + at} ended without its artifact, and never ran" in again.err
    # What waits for it is taken back, and waits for the new job.
    assert [job[1] for job in submitted.jobs[13:]] == [nodes[i].command for i in after] and len(after) == 3
    assert cancelled == [["scancel", str(100 + i)] for i in after[1:]]
    assert "113" in submitted.jobs[14][0]["dependency"].split(":")


def test_a_job_that_ends_while_the_sweep_looks_is_not_submitted_again(path, sweep, submitted, monkeypatch):
    """Neither is what waited for it, which may be running by now."""
    sweep()
    nodes = graph.build_graph(table(path).cells).values()
    ended = next(i for i, node in enumerate(nodes) if node.stage == "sft")
    submitted.queue = {job: how for job, how in submitted.queue.items() if job[0] != str(100 + ended)}
    monkeypatch.setattr(slurm, "is_current", lambda node: node.stage == "sft")
    monkeypatch.setattr(slurm.subprocess, "run", lambda *_, **__: pytest.fail("cancelled"))
    sweep()
    assert len(submitted.jobs) == 13


def test_a_dry_run_looks_and_submits_nothing(path, sweep, submitted, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    done = sweep("--dry-run")
    assert done.code == 0 and "squeue is not installed here" in done.err
    monkeypatch.setattr(shutil, "which", lambda name: name)
    done = sweep("--dry-run")
    assert done.code == 0 and "13 not submitted" in done.err and not submitted.jobs
    sweep()
    number, name = next(iter(submitted.queue))
    submitted.queue[number, name] = "RUNNING"
    done = sweep("--dry-run")
    assert done.code == 0 and "1 running, 12 pending" in done.err and f"running, job {number}: " in done.err
    del submitted.queue[number, name]
    done = sweep("--dry-run")
    assert done.code == 1 and f"job {number} ended without its artifact, and never ran: classify" in done.err
    assert "1 ended without its artifact, 12 pending" in done.err and len(submitted.jobs) == 13
    assert "set eval.engine: vllm" in done.err  # this machine has no GPU, others may
    monkeypatch.setattr(slurm, "is_current", lambda node: True)  # it ended in this moment
    done = sweep("--dry-run")
    assert done.code == 0 and "1 current, 12 pending" in done.err


def above(node, nodes) -> set:
    """The places of all that a node is made from."""
    of = {other.id: other for other in nodes}
    found = set(node.inputs)
    return found.union(*(above(of[place], nodes) for place in node.inputs))


def test_a_number_that_is_another_job_s_now_is_not_believed(path, sweep, submitted):
    sweep()
    submitted.queue = {(number, "someone-else"): state for (number, _), state in submitted.queue.items()}
    sweep()
    assert len(submitted.jobs) == 26


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("defaults: {time: 1}", "defaults: expected default or a stage"),
        ("rl: {tme: 5}", "rl.tme: choose from account, "),
        ("rl: {time: 5}", "default.time is missing"),
        ("default: {time: 1-00:00:00}", "default.time: expected int, got '1-00:00:00'"),
        ("default: {time: 24:00:00}", "default.time: expected minutes, got 86400"),
        ("default: {time: 5, setup: module load cuda}", "default.setup: expected list, got 'module load"),
        ("rl: {additional_parameters: {dependency: singleton}}", "dependency: lorapar sets it"),
        ("- 1", "list: expected default or a stage"),
        ("rl: {", "is not YAML"),
    ],
)
def test_wrong_settings_are_refused(tmp_path, text, said):
    file = tmp_path / "slurm.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=re.escape(said)):
        slurm.settings(file, list(ORDER))


def test_a_record_that_is_none_is_named(path, sweep, submitted):
    record = path.parent / "runs/sweeps/jobs.json"
    record.parent.mkdir(parents=True, exist_ok=True)
    for text in (b"[]", b'{"a": ["x"]}', b"{", b"\xff"):
        record.write_bytes(text)
        done = sweep()
        assert done.code == 78 and "jobs.json is not a record of jobs" in done.err


def test_lines_of_squeue_that_name_no_job_of_ours(tmp_path, monkeypatch):
    lines = "echo 'CLUSTER: alpha'; echo '7 RUNNING '; printf '9 RUNNING \\377\\n'; echo '8 PENDING a b'"
    (tmp_path / "squeue").write_text(f"#!/bin/sh\n{lines}\n")
    (tmp_path / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    assert slurm.queued() == {("8", "a b"): "PENDING", ("9", "\N{REPLACEMENT CHARACTER}"): "RUNNING"}


def test_a_reply_of_sbatch_that_is_none(tmp_path, monkeypatch):
    for name in ("srun", "sbatch"):
        (tmp_path / name).write_text("#!/bin/sh\necho hello\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    node = SimpleNamespace(stage="sft", title="sft k", step=SimpleNamespace(key="k"), command=["x"])
    cluster = slurm.Cluster(tmp_path, {"default": {"time": 1}}, print)
    with pytest.raises(ServerError, match="Slurm refuses sft k: .*hello"):
        cluster._submit_job(node, [])


def test_without_slurm_it_says_so(tmp_path, monkeypatch):
    with pytest.raises(MissingInputError, match="no file"):
        slurm.settings(tmp_path / "none.yaml", list(ORDER))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MissingInputError, match="squeue is not installed here"):
        slurm.queued()


def test_a_job_ends_as_its_command_does_and_a_signal_between_two_tries_gives_another_run(monkeypatch):
    """As while another process makes the artifact: there is no child then."""
    codes, call = iter([78, 75]), slurm.Call(["x"], "")

    def guarded(command, **options):
        return Guarded([sys.executable, "-c", f"raise SystemExit({next(codes)})"], **options)

    monkeypatch.setattr(slurm, "Guarded", guarded)
    with pytest.raises(SystemExit) as caught:
        call()
    assert caught.value.code == 78

    def told(seconds):
        assert call.checkpoint().function.command == ["x"]
        raise TimeoutError

    monkeypatch.setattr(slurm.time, "sleep", told)
    with pytest.raises(TimeoutError):
        call()


def test_a_signal_in_the_middle_ends_the_step_and_gives_another_run(tmp_path):
    """As in a job: the handler runs while the call waits, and all processes of the job get the signal."""
    (tmp_path / "lorapar_cli.py").write_text("import time; print('running', flush=True); time.sleep(600)")
    (tmp_path / "job.py").write_text(
        "import signal, sys\n"
        "from stages.sweep.slurm import Call\n"
        "call = Call(['x'], '')\n"
        "def told(*_):\n"
        "    again = call.checkpoint()\n"
        "    assert again.function.command == ['x'] and again.function._child is None\n"
        "    sys.exit(5)\n"
        "signal.signal(signal.SIGUSR2, told)\n"
        "call()\n"
    )
    job = subprocess.Popen(
        [sys.executable, str(tmp_path / "job.py")],
        stdout=subprocess.PIPE, text=True, start_new_session=True, cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}"},
    )  # fmt: skip
    assert job.stdout.readline() == "running\n"
    os.killpg(job.pid, signal.SIGUSR2)
    assert job.wait(timeout=30) == 5
    assert job.stdout.read() == ""  # the step has ended, too: nobody holds its end of the pipe


@pytest.fixture
def real(tmp_path, monkeypatch):
    """A Slurm of one node, on this machine; stopped in any case."""
    if not all(map(shutil.which, ("slurmctld", "slurmd", "munged"))) or os.geteuid():
        pytest.skip("Slurm is not installed, or this is not root")
    host = socket.gethostname().partition(".")[0]
    conf = tmp_path / "slurm.conf"
    for name in ("state", "spool"):
        (tmp_path / name).mkdir()
    conf.write_text(
        f"ClusterName=one\nSlurmctldHost={host}(127.0.0.1)\nSlurmUser=root\nAuthType=auth/munge\n"
        f"StateSaveLocation={tmp_path}/state\nSlurmdSpoolDir={tmp_path}/spool\n"
        f"SlurmctldPidFile={tmp_path}/c.pid\nSlurmdPidFile={tmp_path}/d.pid\n"
        f"SlurmctldLogFile={tmp_path}/c.log\nSlurmdLogFile={tmp_path}/d.log\n"
        "ProctrackType=proctrack/linuxproc\nTaskPlugin=task/none\nSelectType=select/cons_tres\n"
        "SelectTypeParameters=CR_Core\nReturnToService=2\nJobRequeue=1\nKillWait=2\nSlurmctldPort=16827\nSlurmdPort=16828\n"
        f"NodeName={host} NodeAddr=127.0.0.1 CPUs={os.cpu_count()} RealMemory=4000\n"
        f"PartitionName=all Nodes={host} Default=YES State=UP\n"
    )
    monkeypatch.setenv("SLURM_CONF", str(conf))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    servers = []
    if subprocess.run(["pgrep", "munged"], capture_output=True).returncode:
        shutil.copy("/etc/munge/munge.key", tmp_path / "key")
        (tmp_path / "key").chmod(0o600)
        os.chown(tmp_path / "key", 0, 0)
        Path("/run/munge").mkdir(exist_ok=True)
        command = ["munged", "-F", "--force", f"--key-file={tmp_path / 'key'}"]
        servers.append(subprocess.Popen(command))
        time.sleep(1)
    servers += [subprocess.Popen(["slurmctld", "-D"]), subprocess.Popen(["slurmd", "-D"])]
    try:
        assert wait_for(lambda: b"idle" in subprocess.run("sinfo", capture_output=True).stdout, 60)
        yield
    finally:
        subprocess.run(["scancel", "--user=root"], check=False)
        time.sleep(2)
        for server in reversed(servers):
            server.terminate()
            server.wait()


@pytest.mark.slow
def test_a_real_slurm_makes_the_table_and_a_requeued_job_goes_on(real, path, sweep):
    """The job of the first RL is queued again in the middle; it resumes, and all ends."""
    done = sweep()
    assert done.code == 0 and "13 steps are queued or running" in done.err, done.err
    jobs = json.loads((path.parent / "runs/sweeps/jobs.json").read_text())
    (first, *_) = [job for name, job in jobs.items() if "/rl/" in name]
    log = path.parent / f"runs/sweeps/slurm/{first}_0_log.out"
    assert wait_for(lambda: log.is_file() and re.search(r" \d+/60 ", log.read_text()), 600)
    assert subprocess.run(["scontrol", "requeue", first]).returncode == 0
    assert wait_for(lambda: "PENDING" in [how for (job, _), how in slurm.queued().items() if job == first])
    # Slurm would let it wait for two minutes.
    subprocess.run(["scontrol", "update", f"JobId={first}", "StartTime=now"], check=True)
    assert wait_for(lambda: not slurm.queued(), 900)
    assert re.search(r"resuming from checkpoint-\d+", log.read_text())
    nodes = graph.build_graph(table(path).cells)
    assert all(node.current for node in nodes.values())
    assert "nothing to do: every artifact is current" in sweep().err
