"""Frozen elements, read back from the files: every launcher, optimizer and objective.

And what several processes agree on.
"""

import json
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, flags, free_port, make_step
from results import history, moved_share, stored, trained_weights

from stages.config import LaunchSection
from stages.lora.importance.masks import read_importance
from stages.pipeline import launch

COMMON = ["{}.weight_decay=0.1", "{}.learning_rate=0.01", "{}.max_steps=3", "{}.num_train_epochs=9"]
BOTH = ["rl.system1_share=0.25", "rl.dynamic_sampling=2", "rl.kl_probe_prompts=4"]
"""Steps of both systems, in which groups are drawn again."""


PAIR = torch.cuda.device_count() != 1
"""Two processes can run: on a GPU each needs one of its own."""
pair = pytest.mark.skipif(not PAIR, reason="two processes need two devices")


def settings(stage: str, *more: str) -> list[str]:
    return [text.format(stage) for text in (*COMMON, *more)]


def command(
    home: list[str], overrides: list[str], stage: str, processes: int, backend: str = "ddp"
) -> subprocess.CompletedProcess:
    """The stage as a person runs it, under the launcher."""
    several = [f"{stage}.launch.backend={backend}", f"{stage}.launch.processes={processes}"]
    command = staged(stage, [*home, *overrides, *several])
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


def staged(stage: str, settings: list[str]) -> list[str]:
    config = str(ROOT / "configs/smoke.yaml")
    return [sys.executable, "-m", "lorapar_cli", stage, config, *flags(*settings), "--force"]


def made_by(small, overrides: list[str], stage: str, processes: int, backend: str = "ddp") -> None:
    """By the command, or where there is one process in this one, which has its libraries already."""
    config = small(*overrides)
    if processes == 1:
        make_step(config, stage, force=True)
    else:
        done = command(small.home, overrides, stage, processes, backend)
        assert done.returncode == 0, done.stderr
    assert stored(config, stage).manifest["provenance"]["processes"] == processes


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "how", "launcher"),
    [
        ("sft", ["sft.padding_free=off", "sft.loraplus_lr_ratio=8"], (1, "single")),
        ("rl", ["rl.prefix_sharing=off"], (1, "single")),
        pytest.param("sft", [], (2, "ddp"), marks=pair),
        pytest.param("rl", ["rl.beta=0"], (2, "ddp"), marks=pair),
        *(pytest.param("rl", how, (2, "fsdp2"), marks=pair) for how in (["rl.beta=0.04"], BOTH)),
    ],
)
def test_frozen_elements_are_identical_on_every_launcher(own, stage, how, launcher):
    """SFT under fsdp2 is compared with ddp's in test_fsdp.py."""
    config = own(*settings(stage, *how))
    if stage == "rl":
        make_step(own(), "sft")
    made_by(own, settings(stage, *how), stage, *launcher)
    assert moved_share(config, stage) > 0.95
    if how == BOTH:  # the groups of System 2, in which no completion is correct, but not that of System 1
        for step in history(stored(config, "rl")):
            assert step["resampled/groups"] == 6 and step["system1/reward"] == step["system2/reward"] == 0


@pair
@pytest.mark.slow
def test_two_processes_train_what_one_does(own):
    """SFT without dropout: the same rows in each step, so the same adapter to float tolerance; and scores."""
    changes = settings("sft", "sft.lora_dropout=0", "sft.learning_rate=0.001")
    config = own(*changes)
    ends, scores = [], []
    for processes in (1, 2):
        for stage in ("score", "sft"):
            if stage == "sft":
                make_step(config, "partition")
            made_by(own, changes, stage, processes)
        scores.append(read_importance(stored(config, "score").path / "importance.safetensors"))
        before, after, _ = trained_weights(config, "sft")
        ends.append({name: after[name] - before[name] for name in before})
    one, two = (torch.cat([x.flatten() for x in end.values()]) for end in ends)
    apart = float((one - two).norm() / one.norm())
    s1, s2 = (torch.cat([t.flatten() for part in s.values() for t in part.values()]) for s in scores)
    apart_scores = float((s1 - s2).norm() / s1.norm())
    assert float(one.norm()) > 0 and apart < 1e-3 and apart_scores < 1e-5


@pair
@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "accelerate"])
def test_two_machines_train_what_two_processes_do(own, tmp_path, launcher):
    """Two commands, as on machines that share the folder of runs: torchrun's agents, or a file for each."""
    changes = settings("sft", "sft.learning_rate=0.002")
    config = own(*changes)
    made_by(own, changes, "sft", 2)
    _, wanted, _ = trained_weights(config, "sft")
    port, running = free_port(), []
    agent = ["--nnodes", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}", "-m"]
    for rank in (0, 1):
        file = tmp_path / f"{rank}.yaml"
        file.write_text(
            f"distributed_type: MULTI_GPU\nnum_machines: 2\nnum_processes: 2\nmachine_rank: {rank}\n"
            f"rdzv_backend: static\nmain_process_ip: 127.0.0.1\nmain_process_port: {port}\n"
            "mixed_precision: 'no'\nuse_cpu: false\n"
        )
        if launcher == "torchrun":
            command = staged("sft", [*own.home, *changes, "sft.launch.backend=ddp"])
            command[1:2] = ["-m", "torch.distributed.run", *agent]
        else:
            command = staged("sft", [*own.home, *changes, f"sft.launch.config={file}"])
        running.append(subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True))
    for process in running:
        _, said = process.communicate(timeout=240)
        assert process.returncode == 0, said
    _, found, _ = trained_weights(config, "sft")
    launch = stored(config, "sft").manifest["provenance"]["config"]["sft"]["launch"]
    given = {"torchrun": ("ddp", None), "accelerate": ("single", str(tmp_path / "0.yaml"))}
    assert (launch["backend"], launch["config"]) == given[launcher]
    assert all(torch.equal(found[name], weight) for name, weight in wanted.items())


@pair
@pytest.mark.slow
def test_an_error_of_one_process_is_the_command_s(own):
    done = command(own.home, ["sft.batch_size=6", "sft.per_device_train_batch_size=2"], "sft", 2)
    assert done.returncode == 78
    assert done.stderr.rstrip().splitlines()[-2:] == [
        "error: 2 processes with micro batches of 2 cannot share 6 samples a step evenly",
        "  hint: lower per_device_train_batch_size or the number of processes",
    ]


@pytest.mark.parametrize(
    ("gpus", "given", "threads"), [(8, {}, 2), (0, {"processes": 4}, 4), (8, {"config": "a"}, None)]
)
def test_processes_share_the_cores_that_there_are(monkeypatch, gpus, given, threads):
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(16)))
    found = launch._threads(LaunchSection(backend="ddp", **given))
    assert found == ({} if threads is None else {"OMP_NUM_THREADS": str(threads)})


def test_a_launcher_starts_only_where_work_is_left(begun, lorapar, monkeypatch):
    make_step(begun(), "sft")
    monkeypatch.setattr("stages.pipeline.launch.run", lambda *_: pytest.fail("launched"))
    overrides = [*begun.home, "sft.launch.backend=ddp"]
    done = lorapar("sft", ROOT / "configs/smoke.yaml", *flags(*overrides), "--json")
    assert done.code == 0 and json.loads(done.out)["made"] is False
