"""What the scripts beside this one measure with: paired ratios, times, and the peak of a process."""

import copy
import random
import statistics
import subprocess
import sys
import time
from typing import Any

import torch
from torch import nn


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


def twin(model: nn.Module) -> Any:
    """A copy of the model's modules on the same weights, which nobody may change: those of 7B are 13 GiB."""
    weights = {id(weight): weight for weight in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, weights)


def interval(ratios: list[float]) -> str:
    """The median and an interval of 95 % by bootstrap: `X [low, high]`. Of fewer than six their range."""
    if len(ratios) < 6:
        return f"{statistics.median(ratios):.3f} (from {min(ratios):.3f} to {max(ratios):.3f})"
    draw = random.Random(0)
    medians = sorted(statistics.median(draw.choices(ratios, k=len(ratios))) for _ in range(2000))
    return f"{statistics.median(ratios):.3f} [{medians[50]:.3f}, {medians[1949]:.3f}]"


def peak(script: str, only: str) -> float:
    """Peak memory in MiB of a process of its own: this one with `--only`."""
    command = [sys.executable, script, *sys.argv[1:], "--only", only]
    return float(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.split()[-1])
