"""What the scripts beside this one measure with: paired ratios, times, and the peak of a process."""

import random
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

MIB = 2**20


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def now() -> float:
    """Seconds, with all work on the device done."""
    synchronize()
    return time.perf_counter()


def timed(action, *arguments) -> float:  # type: ignore[no-untyped-def]
    begun = now()
    action(*arguments)
    return now() - begun


def interval(ratios: list[float]) -> str:
    """The median, and an interval of 95 % by bootstrap: `X [low, high]`."""
    draw = random.Random(0)
    medians = sorted(statistics.median(draw.choices(ratios, k=len(ratios))) for _ in range(2000))
    return f"{statistics.median(ratios):.3f} [{medians[50]:.3f}, {medians[1949]:.3f}]"


def high_water() -> int:
    """Bytes at the highest point of this process; ru_maxrss would begin with those of its parent."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(re.search(r"VmHWM:\s+(\d+)", status)[1]) * 1024  # type: ignore[index]


def highest() -> float:
    """MiB at the highest point of this process or, on a GPU, of its device memory."""
    return (torch.cuda.max_memory_allocated() if torch.cuda.is_available() else high_water()) / MIB


def peak(script: str, only: str) -> float:
    """What `highest` gives in a process of its own: this command again, with `--only`, prints it last."""
    command = [sys.executable, script, *sys.argv[1:], "--only", only]
    return float(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.split()[-1])
