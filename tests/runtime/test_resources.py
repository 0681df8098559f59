"""How much memory a process used and may use."""

import os

import numpy as np
import pytest

from stages.runtime import resources


def test_the_peak_is_of_what_was_used_since_it_was_forgotten():
    resources.reset_peak()
    before = resources.peak_memory()["process"]
    block = np.ones(200 * resources.MIB // 8)
    assert 195 <= resources.peak_memory()["process"] - before <= 230
    del block
    resources.reset_peak()
    assert resources.peak_memory()["process"] - before < 50
    assert resources.peak_device_memory() < resources.total_memory()


@pytest.fixture
def cgroups(tmp_path, monkeypatch):
    """Makes these files of cgroups, of which this process has one."""

    def make(mine: str, files: dict[str, str]) -> None:
        for name, text in {**files, "cgroup": f"{mine}\n"}.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)
        monkeypatch.setattr(resources, "_CGROUP_OF_PROCESS", tmp_path / "cgroup")
        monkeypatch.setattr(resources, "_CGROUP_ROOT", tmp_path)

    return make


@pytest.mark.parametrize(
    ("mine", "files", "limit"),
    [
        ("0::/job/step", {"job/memory.max": f"{300 * resources.MIB}", "job/step/memory.max": "max"}, 300),
        ("3:cpu:/a\n4:memory:/a", {"memory/a/memory.limit_in_bytes": f"{200 * resources.MIB}"}, 200),
    ],
)
def test_the_limit_of_a_container_or_a_job_counts(mine, files, limit, cgroups):
    whole = resources.total_memory()
    cgroups(mine, files)
    assert resources.total_memory() == (limit or whole)


@pytest.mark.parametrize(("text", "cores"), [("150000 100000", 2), ("50000 100000", 1), ("max 100000", None)])
def test_the_quota_of_a_container_counts(text, cores, cgroups, monkeypatch):
    cgroups("0::/", {"cpu.max": f"{text}\n"})
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(64))
    monkeypatch.setattr(os, "environ", dict[str, str]())
    resources.tame_libraries()
    assert resources.usable_cores() == (cores or 64)
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
