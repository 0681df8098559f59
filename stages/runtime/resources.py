"""Measures the machine as this process sees it: cores, memory in MiB (2²⁰ bytes)."""

from __future__ import annotations

import ctypes
import math
import os
import re
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

MIB = 2**20
_STATUS, _CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_CGROUP_ROOT, _CGROUP_OF_PROCESS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
_OPENMP = {"GOMP_SPINCOUNT": "10000", "KMP_BLOCKTIME": "1"}
"""How long a waiting thread spins: loop iterations in GNU's OpenMP, milliseconds in LLVM's and Intel's."""


def usable_cores() -> int:
    """Number of cores that this process may use: a batch job or a container may have less than all."""
    return max(1, min([_affine_cores(), *map(math.ceil, _cpu_quotas())]))


def _affine_cores() -> int:
    affinity = getattr(os, "sched_getaffinity", None)  # macOS has none
    return len(affinity(0)) if affinity else os.cpu_count() or 1


THREADS = "LORAPAR_THREADS"
"""Environment variable with the value of OMP_NUM_THREADS that `tame_libraries` chose."""


def tame_libraries() -> None:
    """Set variables that torch's libraries read when they are loaded; those that the user has set stay.

    Threads that wait go to sleep soon. By default each spins for milliseconds at every barrier; if other
    processes compute, too, it then occupies the core that the thread it waits for needs, and an SFT step
    takes many times as long. Torch starts as many threads as a container's quota has cores, not one for each
    core of the machine. Child processes inherit this.

    oneDNN keeps the kernels of 64 shapes, and not of 1,024. Batches of each step have shapes of their own,
    and what their kernels hold stays until the process ends, which makes all stages of a run: after RL of the
    demo 1,079 MiB were in use (6 steps), now 785 (12 steps; 2026-11-30). The second variable is of torch's
    own cache of them.
    """
    if not set(_OPENMP).union(["OMP_WAIT_POLICY"]) & os.environ.keys():
        os.environ.update(_OPENMP)
    if usable_cores() < _affine_cores() and "OMP_NUM_THREADS" not in os.environ:
        os.environ["OMP_NUM_THREADS"] = os.environ[THREADS] = str(usable_cores())
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(name, "64")


def release_memory() -> None:
    """Return freed memory, which the allocators of libc and torch keep otherwise, to the system and the GPU.

    Does nothing for main memory where the C library has no `malloc_trim`.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)
    if torch := _torch_with_gpu():
        torch.cuda.empty_cache()


def reset_peak() -> None:
    """Return freed memory and reset the counters of `peak_memory`, as far as the system allows."""
    release_memory()
    with suppress(OSError):
        _CLEAR_REFS.write_text("5", encoding="utf-8")  # sets VmHWM to the current usage, see proc(5)
    if torch := _torch_with_gpu():
        torch.cuda.reset_peak_memory_stats()


def peak_memory() -> dict[str, int]:
    """Peak memory in MiB since `reset_peak`: `process`, and `device` if torch has reserved GPU memory."""
    peaks = {"process": _peak_of_process()}
    if (torch := _torch_with_gpu()) and (reserved := torch.cuda.max_memory_reserved()):
        peaks["device"] = reserved // MIB
    return peaks


def peak_device_memory() -> int:
    """Peak memory in MiB: of the GPU if there is one, else of this process."""
    peaks = peak_memory()
    return peaks.get("device", 0) if _has_gpu() else peaks["process"]


def _torch_with_gpu() -> Any:
    """The torch module if this process has a CUDA context, else None; creating one would take half a GiB."""
    torch = sys.modules.get("torch")
    return torch if torch and torch.cuda.is_initialized() else None


def _has_gpu() -> bool:
    torch = sys.modules.get("torch")
    return bool(torch and torch.cuda.is_available())


def total_memory() -> int:
    """Total memory in MiB: of the GPU if there is one, else of the machine, container or batch job."""
    if _has_gpu():
        return int(sys.modules["torch"].cuda.mem_get_info()[1]) // MIB
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limits = _cgroup_texts("memory", "memory.max", "memory.limit_in_bytes")
    return min([physical, *(int(text) for text in limits if text.isdecimal())]) // MIB


def _cpu_quotas() -> Iterator[float]:
    """Limits on the cores that this process's control group and its ancestors may keep busy (version 2)."""
    for text in _cgroup_texts("cpu", "cpu.max"):  # microseconds in each period, or `max`
        quota, _, period = text.partition(" ")
        if quota.isdecimal() and period.isdecimal():
            yield int(quota) / int(period)


def _cgroup_texts(controller: str, version2: str, version1: str | None = None) -> Iterator[str]:
    """The texts of a file of this process's control group and of its ancestors; see cgroups(7).

    version2, version1: the name of the file in the two versions of control groups.
    """
    listing = _CGROUP_OF_PROCESS
    lines = listing.read_text(encoding="utf-8").splitlines() if listing.exists() else []
    for _, controllers, path in (line.split(":", 2) for line in lines):
        name = {"": version2, controller: version1}.get(controllers)
        if name is None:
            continue
        group = _CGROUP_ROOT / controllers / path.lstrip("/")
        for folder in (group, *group.parents):
            with suppress(OSError, ValueError):
                yield (folder / name).read_text(encoding="utf-8").strip()


def _peak_of_process() -> int:
    """Peak resident memory in MiB. Only VmHWM can be reset; elsewhere it is the peak since the start."""
    with suppress(OSError):
        if match := re.search(r"^VmHWM:\s+(\d+) kB", _STATUS.read_text(encoding="utf-8"), re.MULTILINE):
            return int(match[1]) // 1024
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit // MIB
