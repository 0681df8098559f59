"""Rank helpers for a stage under a launcher; with a single process they do not load torch.distributed."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from contextlib import suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from stages.errors import ConfigError, LoraparError

if TYPE_CHECKING:
    from torch import Tensor

TIMEOUT_S = 1800
"""Timeout of collectives, equal to the trainers' default (`ddp_timeout`)."""
FAILURE_ENV = "LORAPAR_FAILURE"
"""Environment variable with the path of the file in which a launched process reports its error."""


def launched() -> bool:
    """True if a launcher (accelerate, torchrun) started this process."""
    # A cluster may set the other two for every process of a pod.
    return {"RANK", "WORLD_SIZE", "LOCAL_RANK"} <= os.environ.keys()


def world_size() -> int:
    return int(os.environ["WORLD_SIZE"]) if launched() else 1


def rank() -> int:
    return int(os.environ["RANK"]) if launched() else 0


def is_main() -> bool:
    return rank() == 0


def local_rank() -> int:
    """Number of this process among those on its machine."""
    return int(os.environ.get("LOCAL_RANK", rank())) if launched() else 0


def local_world_size() -> int:
    """Number of processes on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", world_size())) if launched() else 1


def barrier() -> None:
    """Wait until every process has reached this point."""
    if world_size() > 1:
        connect().wait_for_everyone()


def all_equal(value: Any) -> bool:
    """True if `value` is the same in all processes."""
    if world_size() == 1:
        return True
    from accelerate.utils import gather_object

    connect()
    return len(set(gather_object([value]))) == 1


def all_reduce(tensors: Iterable[Tensor]) -> None:
    """Replace each tensor in place by its sum over all processes."""
    if world_size() > 1:
        import torch.distributed as dist

        connect()
        for tensor in tensors:
            dist.all_reduce(tensor)


def connect() -> Any:
    """Join the other processes, as the first collective does otherwise. Returns accelerate's state."""
    import torch
    from accelerate import PartialState

    # NCCL's default of ten minutes is too short for an RL step in which all others wait for rank 0's samples.
    return PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(seconds=TIMEOUT_S))


def check_accelerate_settings(divided: bool, precision: str) -> None:
    """Raise ConfigError for accelerate settings that would silently corrupt training.

    divided: by accelerate's FSDP or DeepSpeed. precision: its `mixed_precision`.
    """
    if divided:
        raise ConfigError(
            "launch.config asks for FSDP or DeepSpeed by accelerate, which was not tested",
            "leave launch.config out and use launch.backend=fsdp2, which divides the base model",
        )
    if precision != "no":
        raise ConfigError(
            f"launch.config: mixed_precision {precision} would change results, and no artifact records it",
            "set mixed_precision to no in that file",
        )


def report_failure(error: LoraparError) -> bool:
    """Write the error to the parent's failure file; False if there is no such file.

    Only the first error of all processes is kept.
    """
    if FAILURE_ENV not in os.environ:
        return False
    draft = f"{os.environ[FAILURE_ENV]}.{os.getpid()}"
    with suppress(OSError):  # another process has reported already, or the disk is full
        with open(draft, "w", encoding="utf-8") as file:
            json.dump([error.exit_code, str(error), error.hint], file)
        os.link(draft, os.environ[FAILURE_ENV])  # atomic, and fails if the file exists
    return os.path.exists(os.environ[FAILURE_ENV])
