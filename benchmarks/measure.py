"""What the scripts beside this one share: options, turns of what is compared, ratios, times, peaks."""

import argparse
import copy
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

T = TypeVar("T")


def options(description: str | None, *positional: str, **defaults: Any) -> argparse.ArgumentParser:
    """A parser of these arguments, and of an option for each default, of its type: `micro_batch=8`."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawTextHelpFormatter)
    for name in positional:
        parser.add_argument(name)
    for name, default in defaults.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default)
    return parser


def from_to(text: str) -> tuple[int, int]:
    """The bounds of a range such as 8-40."""
    low, high = map(int, text.split("-"))
    return low, high


def lorapar(*arguments: str, settings: Sequence[str] = ()) -> list[str]:
    """A command of lorapar, with these settings."""
    flags = [part for setting in settings for part in ("--set", setting)]
    return [sys.executable, "-m", "lorapar_cli", *arguments, *flags]


def now() -> float:
    """Seconds, with all work on the device done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def timed(action: Callable[..., object], *arguments: Any) -> float:
    begun = now()
    action(*arguments)
    return now() - begun


def in_turns(names: Sequence[str], rounds: int, measured: Callable[[str, int], T]) -> dict[str, list[T]]:
    """Collect `measured(name, round)` for each name, in an order drawn at random in each round.

    Round 0 warms up, and does not count.
    """
    found: dict[str, list[T]] = {name: [] for name in names}
    for number in range(rounds + 1):
        for name in random.sample(names, len(names)):
            value = measured(name, number)
            if number:
                found[name].append(value)
    return found


def ratio(theirs: Iterable[float], ours: Iterable[float]) -> str:
    """The median of theirs / ours and an interval of 95 % by bootstrap: `X [low, high]`.

    Of fewer than six pairs their range.
    """
    ratios = [a / b for a, b in zip(theirs, ours, strict=True)]
    if len(ratios) < 6:
        return f"{statistics.median(ratios):.3f} (from {min(ratios):.3f} to {max(ratios):.3f})"
    draw = random.Random(0)
    medians = sorted(statistics.median(draw.choices(ratios, k=len(ratios))) for _ in range(2000))
    return f"{statistics.median(ratios):.3f} [{medians[50]:.3f}, {medians[1949]:.3f}]"


def machine(device: torch.device) -> str:
    isa = os.environ.get("ONEDNN_MAX_CPU_ISA", "not set")
    return f"{torch.get_num_threads()} threads, ONEDNN_MAX_CPU_ISA {isa}, device {device}"


def twin(model: nn.Module) -> Any:
    """A copy of the model's modules on the same weights, which nobody may change: those of 7B are 13 GiB."""
    weights = {id(weight): weight for weight in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, weights)


def random_masks(layers: dict[str, nn.Linear], share: float) -> dict[str, Tensor]:
    """A mask of the weight of each layer, with so much of it active."""
    generator = torch.Generator().manual_seed(1)
    return {
        name: torch.rand(layer.weight.shape, generator=generator) < share for name, layer in layers.items()
    }


def peak(script: str, only: str) -> float:
    """Peak memory in MiB of a process of its own: this one with `--only`."""
    command = [sys.executable, script, *sys.argv[1:], "--only", only]
    return float(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.split()[-1])


def peaks(script: str) -> str:
    """The peaks of a process that trains TRL's way, and of one that trains ours."""
    theirs, ours = (peak(script, name) for name in ("TRL", "lorapar"))
    return f"peak of a process {theirs / ours:.3f}: TRL {theirs:,.0f} MiB, lorapar {ours:,.0f} MiB"
