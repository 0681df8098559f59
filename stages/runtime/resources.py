"""What this process has of the machine: cores, memory in MiB (2²⁰ bytes), and its GPUs' energy in joules."""

from __future__ import annotations

import ctypes
import os
import re
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

MIB = 2**20
_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_STAT = Path("/proc/stat")
_GROUPS, _MINE = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
_OPENMP = {"GOMP_SPINCOUNT": "10000", "KMP_BLOCKTIME": "1"}
"""How long a waiting thread spins: turns of a loop for GNU's OpenMP, milliseconds for LLVM's and Intel's."""


def usable_cores() -> int:
    """Cores that this process may use: fewer than the machine has in a job that was given some of them."""
    able = getattr(os, "sched_getaffinity", None)  # macOS has none
    return len(able(0)) if able else os.cpu_count() or 1


def let_waiting_threads_sleep() -> None:
    """Have OpenMP's threads sleep soon while they wait; call it before torch is loaded. Children inherit it.

    By default each spins for milliseconds at every barrier. Beside anything else that computes it then spins
    on the core for which the thread that it waits for has to wait: an SFT step takes many times as long. What
    a person has set stays.
    """
    if not set(_OPENMP).union(["OMP_WAIT_POLICY"]) & os.environ.keys():
        os.environ.update(_OPENMP)


def busy_seconds() -> float | None:
    """Seconds that the cores of this process have worked, for anybody, since the machine was started.

    Work of other machines on the same hardware counts, where the system knows of it. See proc(5).
    """
    able = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else ()
    names = {f"cpu{number}" for number in able}
    try:
        lines = [line.split() for line in _STAT.read_text(encoding="utf-8").splitlines()]
        ticks = [sum(map(int, fields[:3] + fields[5:8])) for name, *fields in lines if name in names]
    except (OSError, ValueError):
        return None
    return sum(ticks) / os.sysconf("SC_CLK_TCK") if ticks else None


def release_memory() -> None:
    """Give the system and the GPU the memory that is free in this process; libraries keep it otherwise.

    Where the C library cannot, nothing happens.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)
    if torch := _in_use():
        torch.cuda.empty_cache()


def reset_peak() -> None:
    """Give freed memory back and begin the count of `peak` anew, as far as the system can."""
    release_memory()
    with suppress(OSError):
        _CLEAR.write_text("5", encoding="utf-8")  # see proc(5): the peak is then what is used now
    if torch := _in_use():
        torch.cuda.reset_peak_memory_stats()


def peak_memory() -> dict[str, int]:
    """The most that was used since `forget`: by the process, and of a GPU by torch in it, if it did."""
    found = {"process": _process()}
    if (torch := _in_use()) and (used := torch.cuda.max_memory_reserved()):
        found["device"] = used // MIB
    return found


def peak_of_scarce() -> int:
    """Of the memory that is scarce: the GPU's, or without one the machine's."""
    found = peak_memory()
    return found.get("device", 0) if _has_gpu() else found["process"]


def gpu_energy() -> float | None:
    """What the GPUs that are visible here have used since their driver was loaded, by NVML; None if unknown.

    All processes on them count, servers too.
    """
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        asked = os.environ.get("CUDA_VISIBLE_DEVICES")
        names = range(pynvml.nvmlDeviceGetCount()) if asked is None else filter(None, asked.split(","))
        handles = [_nvml_handle(pynvml, str(name).strip()) for name in names]
        used = [pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) for handle in handles]
    except pynvml.NVMLError:  # no driver, no such device, or one that does not tell
        return None
    return sum(used) / 1000 if used else None


def _nvml_handle(pynvml: Any, name: str) -> Any:
    if name.isdecimal():
        return pynvml.nvmlDeviceGetHandleByIndex(int(name))
    return pynvml.nvmlDeviceGetHandleByUUID(name)


def _in_use() -> Any:
    """torch if this process computes on a GPU. To ask the GPU alone would begin that, and take half a GiB."""
    torch = sys.modules.get("torch")
    return torch if torch and torch.cuda.is_initialized() else None


def _has_gpu() -> bool:
    torch = sys.modules.get("torch")
    return bool(torch and torch.cuda.is_available())


def total_memory() -> int:
    """How much of it there is. The limit of a container or a batch job counts as the machine's."""
    if _has_gpu():
        return int(sys.modules["torch"].cuda.mem_get_info()[1]) // MIB
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([whole, *_limits()]) // MIB


def _limits() -> Iterator[int]:
    """The limits of this process's control group and of those around it, in bytes; see cgroups(7)."""
    lines = _MINE.read_text(encoding="utf-8").splitlines() if _MINE.exists() else []
    for _, controllers, path in (line.split(":", 2) for line in lines):
        if controllers not in ("", "memory"):
            continue
        name = "memory.limit_in_bytes" if controllers else "memory.max"
        group = _GROUPS / controllers / path.lstrip("/")
        for folder in (group, *group.parents):
            with suppress(OSError, ValueError):  # in version 2 `max` says that there is none
                yield int((folder / name).read_text(encoding="utf-8"))


def _process() -> int:
    with suppress(OSError):
        if found := re.search(r"^VmHWM:\s+(\d+) kB", _STATUS.read_text(encoding="utf-8"), re.MULTILINE):
            return int(found[1]) // 1024
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit // MIB
