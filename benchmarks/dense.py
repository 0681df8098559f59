"""Experiment N of docs/results/plans.md: lorapar from a start, and with scores, that several arms share.

python benchmarks/dense.py --mean START RUN RUN …    write the mean of the runs' importances into START
python benchmarks/dense.py START run CONFIG --set …  lorapar, whose initial adapter is START/adapter

START/importance.safetensors, if it is there, takes the place of the scores that `score` computes.
"""

import shutil
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from unittest import mock

from lorapar_cli.__main__ import main
from stages.lora.adapter import adapter
from stages.lora.importance import masks
from stages.score import run as score

SCORES = "importance.safetensors"


def write_mean(start: Path, runs: Iterable[Path]) -> None:
    """Write the mean over `runs` of the importance of each element, by system."""
    of_runs = [masks.read_importance(run / "score/latest" / SCORES) for run in runs]
    mean = {
        system: {name: sum(of[system][name] for of in of_runs) / len(of_runs) for name in weights}
        for system, weights in of_runs[0].items()
    }
    masks.write_importance(start / SCORES, mean)


def lorapar(start: Path, arguments: list[str]) -> None:
    """Run lorapar with these arguments from the adapter in `start`."""

    def initial(base: Any, lora: Any, seed: int) -> Any:
        return adapter.attach(base, lora, start / "adapter")

    def write_importance(path: Path, scores: Any) -> None:
        if (start / SCORES).exists():
            shutil.copy(start / SCORES, path)
        else:
            masks.write_importance(path, scores)

    sys.argv = ["lorapar", *arguments]
    replaced = mock.patch.multiple(score, write_importance=write_importance)
    with replaced, mock.patch.object(adapter, "initial", initial):
        main()


if __name__ == "__main__":
    if sys.argv[1] == "--mean":
        write_mean(Path(sys.argv[2]), map(Path, sys.argv[3:]))
    else:
        lorapar(Path(sys.argv[1]), sys.argv[2:])
