"""What a process has of the machine: memory, cores, and a GPU; one that torch cannot use ends a run early."""

import os
import re

import numpy as np
import pytest
import torch
from conftest import ROOT, flags

from lorapar_cli import doctor
from stages.config import ModelSection
from stages.errors import ConfigError
from stages.models import base
from stages.runtime import gpu, resources
from stages.runtime.resources import MIB


def test_the_peak_is_of_what_was_used_since_it_was_forgotten():
    resources.reset_peak()
    before = resources.peak_memory()["process"]
    block = np.ones(200 * MIB // 8)
    assert 195 <= resources.peak_memory()["process"] - before <= 230
    del block
    resources.reset_peak()
    assert resources.peak_memory()["process"] - before < 50
    assert resources.peak_device_memory() < resources.total_memory()


@pytest.mark.parametrize(
    ("mine", "files", "memory", "cores"),
    [
        ("0::/job/step", {"job/memory.max": 300 * MIB, "job/step/memory.max": "max"}, 300, None),
        ("3:cpu:/a\n4:memory:/a", {"memory/a/memory.limit_in_bytes": 200 * MIB}, 200, None),
        ("0::/", {"cpu.max": "150000 100000"}, None, 2),
        ("0::/", {"cpu.max": "50000 100000"}, None, 1),
        ("0::/", {"cpu.max": "max 100000"}, None, None),
    ],
)
def test_the_limits_of_a_container_or_a_job_count(mine, files, memory, cores, tmp_path, monkeypatch):
    whole = resources.total_memory()
    for name, text in {**files, "cgroup": mine}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"{text}\n")
    monkeypatch.setattr(resources, "_CGROUP_OF_PROCESS", tmp_path / "cgroup")
    monkeypatch.setattr(resources, "_CGROUP_ROOT", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(64))
    monkeypatch.setattr(os, "environ", dict[str, str]())
    resources.tame_libraries()
    assert (resources.total_memory(), resources.usable_cores()) == (memory or whole, cores or 64)
    chosen = os.environ.get("OMP_NUM_THREADS")
    assert chosen == os.environ.get(resources.THREADS) == (str(cores) if cores else None)


@pytest.mark.parametrize(
    ("theirs", "spins"),
    [({}, "10000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "PASSIVE"}, None)],
)
def test_waiting_threads_sleep_soon_unless_a_person_has_said_how(monkeypatch, theirs, spins):
    monkeypatch.setattr(os, "environ", dict(theirs))
    resources.tame_libraries()
    assert os.environ.get("GOMP_SPINCOUNT") == spins


TOO_OLD = "The NVIDIA driver on your system is too old (found version 11040)"


@pytest.fixture
def old_driver(monkeypatch, tmp_path):
    """A machine whose driver is older than torch's CUDA."""

    def init():
        raise RuntimeError(f"{TOO_OLD}. Please update your GPU driver by downloading a new version.")

    monkeypatch.setattr(gpu, "DEVICE_FILE", tmp_path)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "init", init)
    monkeypatch.setenv(gpu.VISIBLE, "0")


def test_the_reason_is_torch_s_own(old_driver, monkeypatch, tiny):
    with pytest.raises(ConfigError, match=f"{re.escape(TOO_OLD)}$"):
        base.load_base(ModelSection(name=str(tiny)))
    assert doctor._device()[2] is False
    monkeypatch.setattr(torch.version, "cuda", None)
    assert gpu.unusable_reason() == f"torch {torch.__version__} is built without CUDA"
    monkeypatch.setenv(gpu.VISIBLE, "")
    assert gpu.unusable_reason() is None and not gpu.is_visible()


def test_a_run_s_check_stops_unless_the_cpu_is_asked_for(old_driver, lorapar, own):
    check = ["plan", ROOT / "configs/smoke.yaml", "--check", *flags(*own.home)]
    stopped = lorapar(*check)
    assert stopped.code == 65 and TOO_OLD in stopped.err and "--set model.device=cpu" in stopped.err
    assert lorapar(*check, "--set", "model.device=cpu").code == 0
    assert os.environ[gpu.VISIBLE] == ""  # also for what is started from here
