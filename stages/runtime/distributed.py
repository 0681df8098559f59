"""The processes of one stage under a launcher: ranks and common operations, free for one process alone."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from contextlib import suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from stages.errors import LoraparError

if TYPE_CHECKING:
    from torch import Tensor

LONGEST_S = 1800
"""How long processes wait for each other: the trainers' own default."""
FAILURE = "LORAPAR_FAILURE"
"""Environment variable that names the file in which a launched process leaves its error for the parent."""


def launched() -> bool:
    """Whether a launcher (accelerate, torchrun) started this process."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def size() -> int:
    return int(os.environ["WORLD_SIZE"]) if launched() else 1


def rank() -> int:
    return int(os.environ["RANK"]) if launched() else 0


def is_main() -> bool:
    return rank() == 0


def barrier() -> None:
    """Wait until every process has come to this point."""
    if size() > 1:
        _state().wait_for_everyone()


def all_equal(value: Any) -> bool:
    """Whether `value` is the same in all processes."""
    if size() == 1:
        return True
    from accelerate.utils import gather_object

    _state()
    return len(set(gather_object([value]))) == 1


def all_reduce(tensors: Iterable[Tensor]) -> None:
    """Replace each tensor by its sum over all processes."""
    if size() > 1:
        import torch.distributed as dist

        _state()
        for tensor in tensors:
            dist.all_reduce(tensor)


def _state() -> Any:
    import torch
    from accelerate import PartialState

    # NCCL's ten minutes would end a step of RL in which the others wait for the first one's samples.
    return PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(seconds=LONGEST_S))


def report_failure(error: LoraparError) -> bool:
    """Leave the error for the parent; False if no parent waits for it. Only the first error is kept."""
    if not launched() or FAILURE not in os.environ:
        return False
    own = f"{os.environ[FAILURE]}.{os.getpid()}"
    with suppress(OSError):  # another's is there, or the disk is full
        with open(own, "w", encoding="utf-8") as file:
            json.dump([error.exit_code, str(error), error.hint], file)
        os.link(own, os.environ[FAILURE])  # whole or not at all
    return os.path.exists(os.environ[FAILURE])
