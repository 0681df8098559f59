"""A base divided among two processes (FSDP2) trains what whole copies of it would have trained."""

import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, make_step, wait_for
from results import stored, trained_weights
from safetensors.torch import load_file
from test_frozen import command, made_by, pair, settings, staged
from transformers import AutoModelForCausalLM

from stages.lora.importance.masks import read_importance
from stages.pipeline.resolve import resolved
from stages.pipeline.steps import plan_steps
from stages.store.artifacts import Store
from stages.store.checkpoints import SEAL

pytestmark = [pair, pytest.mark.slow]
APART = 0.05 if torch.cuda.is_available() else 0.0
"""How far two updates may be from each other, in norm, as a share of the first: on a GPU no two runs are
equal to the bit, because attention adds up in the order in which its blocks end."""


def joined(tensors: dict) -> torch.Tensor:
    return torch.cat([tensors[name].flatten() for name in sorted(tensors)])


def assert_alike(one: torch.Tensor, two: torch.Tensor) -> None:
    assert float(one.norm()) > 0 and float((one - two).norm()) <= APART * float(one.norm())


def assert_held(config, stage: str, backend: str) -> None:
    """A part of the base if it was divided, by the manifest."""
    share = stored(config, stage).manifest["summary"].get("base_held")
    assert share is None if backend == "ddp" else 0.5 < share < 0.8


@pytest.fixture
def half(tiny, tmp_path):
    """A checkpoint in float16, in which nothing is trained: loading it copies its weights."""
    folder = shutil.copytree(tiny, tmp_path / "float16")
    AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float16).save_pretrained(folder)
    return folder


def test_a_divided_base_holds_its_part_and_answers_as_the_whole(half, tmp_path):
    """And the processes copy the whole one after the other."""
    log = tmp_path / "log"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [*launcher, str(ROOT / "tests/lora/divided.py"), str(half), str(log)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert log.read_text().splitlines() == ["0 reads", "0 shares", "1 reads", "1 shares"]


def test_processes_that_wait_for_their_turn_end_with_the_one_that_failed(own, half):
    changes = [f"model.name={half}", "classify.strategy=random"]
    make_step(own(*changes), "classify:train")
    weights = half / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    done = command(own.home, changes, "score", 2, "fsdp2")
    assert done.returncode == 65 and f"error: cannot load model {half}: Safetensor" in done.stderr


@pytest.mark.parametrize(
    "how", [[], ["sft.gradient_checkpointing=true", "sft.padding_free=off", "sft.lora_dropout=0.1"]]
)
def test_sft_is_that_of_ddp_to_the_bit(own, how):
    found = []
    for backend in ("ddp", "fsdp2"):
        changes = settings("sft", "sft.per_device_train_batch_size=2", *how)
        made_by(own, changes, "sft", 2, backend)
        before, after, _ = trained_weights(own(*changes), "sft")
        found.append(joined(after) - joined(before))
        assert_held(own(*changes), "sft", backend)
    assert_alike(*found)


@pytest.mark.parametrize("scorer", ["taylor2", "moved"])
def test_importance_is_that_of_ddp_also_where_one_process_has_fewer_batches(own, scorer):
    found = []
    for backend in ("ddp", "fsdp2"):
        changes = [f"score.scorer={scorer}", "score.examples=5", "score.batch_size=1"]
        made_by(own, changes, "score", 2, backend)
        config = own(*changes)
        systems = read_importance(stored(config, "score").path / "importance.safetensors")
        found.append(torch.cat([joined(systems[system]) for system in (1, 2)]))
        assert_held(config, "score", backend)
    assert_alike(*found)


def test_a_killed_run_goes_on_to_the_same_bytes(own):
    changes = settings("sft", "sft.learning_rate=0.003", "sft.save_steps=1", "sft.launch.backend=fsdp2")
    changes += ["sft.launch.processes=2", "sft.max_steps=30", "sft.num_train_epochs=99"]
    config = own(*changes)
    make_step(config, "partition")
    *command, force = staged("sft", [*own.home, *changes])
    store, key = Store(config.root), plan_steps(resolved(config))["sft"].key
    running = subprocess.Popen(command, cwd=ROOT, start_new_session=True, stderr=subprocess.DEVNULL)
    sealed = f"sft/checkpoints/{key}/checkpoint-*/{SEAL}"
    assert wait_for(lambda: running.poll() is not None or list(config.root.glob(sealed)), 240)
    assert running.poll() is None
    os.killpg(running.pid, signal.SIGKILL)
    running.wait()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "from step" in done.stderr, done.stderr
    adapter = store.folder("sft", key) / "adapter/adapter_model.safetensors"
    resumed = load_file(adapter)
    assert subprocess.run([*command, force], cwd=ROOT, capture_output=True).returncode == 0
    before = joined(trained_weights(config, "sft")[0])
    assert_alike(joined(load_file(adapter)) - before, joined(resumed) - before)
