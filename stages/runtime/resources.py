"""The machine as this process sees it: cores, memory in MiB (2²⁰ bytes), and where that runs out."""

import ctypes
import logging
import math
import os
import re
import resource
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from stages.errors import OutOfMemoryError, is_out_of_memory

log = logging.getLogger(__name__)
T = TypeVar("T")
MIB = 2**20
_CGROUP_ROOT, _CGROUP_OF_PROCESS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
_OPENMP = {"GOMP_SPINCOUNT": "10000", "KMP_BLOCKTIME": "1"}
"""How long a waiting thread spins: loop iterations in GNU's OpenMP, milliseconds in LLVM's and Intel's."""


def usable_cores() -> int:
    """Number of cores that this process may use: a batch job or a container may have less than all."""
    return max(1, min([len(os.sched_getaffinity(0)), *map(math.ceil, _cpu_quotas())]))


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
    if usable_cores() < len(os.sched_getaffinity(0)) and "OMP_NUM_THREADS" not in os.environ:
        os.environ["OMP_NUM_THREADS"] = os.environ[THREADS] = str(usable_cores())
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(name, "64")


def release_memory() -> None:
    """Return freed memory, which the allocators of libc and torch keep, to the system and the GPU."""
    ctypes.CDLL(None).malloc_trim(0)
    if torch := _torch_with_gpu():
        torch.cuda.empty_cache()


def reset_peak() -> None:
    """Return freed memory and reset the counters of `peak_memory`, as far as the system allows."""
    release_memory()
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", "utf-8")  # VmHWM becomes the current usage, see proc(5)
    if torch := _torch_with_gpu():
        torch.cuda.reset_peak_memory_stats()


def peak_memory() -> dict[str, int]:
    """Peak memory in MiB since `reset_peak`: `process`, and `device` if torch has reserved GPU memory."""
    # Only VmHWM can be reset; where the system has none, it is the peak since the start.
    found = re.search(r"^VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text("utf-8"), re.MULTILINE)
    kib = int(found[1]) if found else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    peaks = {"process": kib // 1024}
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
    exists = _CGROUP_OF_PROCESS.exists()
    lines = _CGROUP_OF_PROCESS.read_text(encoding="utf-8").splitlines() if exists else []
    for _, controllers, path in (line.split(":", 2) for line in lines):
        name = {"": version2, controller: version1}.get(controllers)
        if name is None:
            continue
        group = _CGROUP_ROOT / controllers / path.lstrip("/")
        for folder in (group, *group.parents):
            with suppress(OSError, ValueError):
                yield (folder / name).read_text(encoding="utf-8").strip()


@dataclass
class BatchSize:
    """The batch size of a setting, and what it has become where memory ran out."""

    setting: str
    now: int
    hint: str
    """Advice for where no smaller batch helps."""

    def attempt(self, number: int, compute: Callable[..., T], *arguments: Any) -> T | None:
        """Return the result of `compute` for a batch of `number` examples, or None if memory ran out.

        Then `now` is half of `number`, and a warning says so; OutOfMemoryError if that was one example.
        """
        try:
            return compute(*arguments)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            if number <= 1:
                raise OutOfMemoryError(f"out of memory with {self.setting} {number}", self.hint) from error
        self.now = number // 2
        log.warning("out of memory with %s %d: going on with %d", self.setting, number, self.now)
        release_memory()  # not in the `except` block, in which the error holds the batch's tensors
        return None
