"""Two processes that train together: frozen elements, what both hold, a kill, and errors of one of them."""

import os
import signal
import subprocess
import sys

import psutil
import pytest
import torch
from conftest import LORAPAR, ROOT, flags, make_step, wait_for
from results import moved_share, trained_weights
from safetensors.torch import load_file

from lorapar_cli import stage as commands
from stages.errors import ConfigError, OutOfMemoryError
from stages.pipeline.resolve import resolved
from stages.pipeline.steps import plan_steps
from stages.runtime import process_guard, ranks
from stages.store.artifacts import Store
from stages.store.checkpoints import SEAL

several = pytest.mark.skipif(torch.cuda.device_count() == 1, reason="two processes need two devices")
TWO = "launch.processes=2"
LARGE = ["weight_decay=0.1", "learning_rate=0.01", "max_steps=3", "num_train_epochs=9"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def command(name: str, settings: list[str]) -> list[str]:
    return [*LORAPAR, name, "configs/smoke.yaml", *flags(*settings)]


def run(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(arguments, capture_output=True, text=True, cwd=ROOT)


@several
@pytest.mark.slow
def test_two_processes_train_what_one_does_whoever_starts_them_and_frozen_elements_keep_their_bits(own):
    """Both processes hold the same adapter at the end: the stage asserts it.

    SFT without dropout has the same rows in each step, so the same adapter to float tolerance.
    """
    changes = ["sft.lora_dropout=0", *(f"{name}.{setting}" for name in ("sft", "rl") for setting in LARGE)]
    config, ends = own(*changes), []
    make_step(config, "sft")
    for name, launcher in (("sft", None), ("sft", []), ("sft", TORCHRUN), ("rl", [])):
        if launcher is not None:
            arguments = command(name, [*own.home, *changes, *([] if launcher else [TWO])])
            done = run([*launcher, *arguments[bool(launcher) :], "--force"])
            assert done.returncode == 0, done.stderr
            assert make_step(config, name).manifest["provenance"]["processes"] == 2
        assert moved_share(config, name) > 0.95
        before, after, _ = trained_weights(config, name)
        ends.append(torch.cat([(after[name] - before[name]).flatten() for name in before]))
    one, two, by_torchrun, _ = ends
    assert float(one.norm()) > 0 and float((one - two).norm() / one.norm()) < 1e-3
    assert torch.equal(two, by_torchrun)


@several
@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_bytes(own):
    """First one of two processes is killed, which ends the command, and then the command itself."""
    changes = ["sft.save_steps=1", "sft.max_steps=30", "sft.num_train_epochs=99"]
    config = own(*changes)
    arguments, key = command("sft", [*own.home, *changes, TWO]), plan_steps(resolved(config))["sft"].key
    done = run(arguments)
    assert done.returncode == 0, done.stderr
    weights = Store(config.root).folder("sft", key) / "adapter/adapter_model.safetensors"
    wanted = load_file(weights)
    arguments.append("--force")
    for victim in ("worker", "command"):
        running = subprocess.Popen(arguments, cwd=ROOT, stderr=subprocess.PIPE, text=True)
        started = len(list(config.root.glob(f"sft/checkpoints/{key}/checkpoint-*")))
        sealed = f"sft/checkpoints/{key}/checkpoint-{'?' if not started else '1?'}/{SEAL}"
        assert wait_for(lambda: running.poll() is not None or list(config.root.glob(sealed)), 240)  # noqa: B023
        assert running.poll() is None
        if victim == "command":
            running.kill()
        else:
            worker = next(p for p in psutil.process_iter() if _is_rank(p, "1", running.pid))
            worker.kill()
        _, said = running.communicate(timeout=60)
        if victim == "worker":
            assert running.returncode == OutOfMemoryError.exit_code
            assert "error: process 1 was killed, probably for lack of memory" in said
        assert wait_for(lambda: not list(psutil.Process().children(recursive=True)))
    done = run(arguments)
    assert done.returncode == 0 and "from step" in done.stderr, done.stderr
    ended = load_file(weights)
    assert all(torch.equal(ended[name], weight) for name, weight in wanted.items())


def _is_rank(process: psutil.Process, rank: str, ancestor: int) -> bool:
    try:
        ancestors = [parent.pid for parent in process.parents()]
        guarded = process_guard.__file__ not in process.cmdline()
        return guarded and ancestor in ancestors and process.environ().get("RANK") == rank
    except psutil.Error:
        return False


@several
@pytest.mark.slow
def test_an_error_of_all_is_said_once(own):
    done = run(command("sft", [*own.home, "sft.batch_size=6", "sft.per_device_train_batch_size=2", TWO]))
    assert done.returncode == 78 and done.stderr.rstrip().splitlines()[-2:] == [
        "error: 2 processes with micro batches of 2 cannot share 6 samples a step evenly",
        "  hint: lower per_device_train_batch_size or the number of processes",
    ]


def test_the_first_failure_ends_the_others(monkeypatch):
    monkeypatch.setattr(process_guard, "PATIENCE_S", 1)
    for first, other, expected in (("sys.exit(3)", "time.sleep(600)", 3), ("None", "None", 0)):
        program = f"import os, sys, time; {first} if os.environ['RANK'] == '1' else {other}"
        assert ranks.run([sys.executable, "-c", program], 2) == expected
    with pytest.raises(OutOfMemoryError, match="process 0 was killed"):
        ranks.run([sys.executable, "-c", f"import os; os.kill(os.getpid(), {int(signal.SIGKILL)})"], 1)


def test_processes_are_started_for_what_trains_and_where_work_is_left(begun, lorapar, monkeypatch):
    settings = begun(TWO)
    steps = plan_steps(resolved(settings))
    assert [commands.processes(settings, steps[name]) for name in ("score", "sft", "rl")] == [0, 2, 2]
    make_step(begun(), "sft")
    monkeypatch.setattr(ranks, "run", lambda *_: pytest.fail("started"))
    done = lorapar("sft", ROOT / "configs/smoke.yaml", *flags(*begun.home, TWO))
    assert done.code == 0 and "is current" in done.err
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.setitem(os.environ, name, "0")
    monkeypatch.setitem(os.environ, "WORLD_SIZE", "2")
    assert commands.processes(settings, steps["sft"]) == 0
    with pytest.raises(ConfigError, match="eval was started in 2 processes, and is for one"):
        commands.processes(settings, steps["eval:sft@demo"])
