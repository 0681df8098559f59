"""The processes that train together (DDP): which of them this one is, waiting for the others, starting them.

The variables of the environment are torch's, so that torchrun and accelerate can start them, too. With a
single process nothing here but `check_gpus` loads torch.
"""

import os
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from stages.errors import ConfigError, OutOfMemoryError, ServerError
from stages.runtime import resources
from stages.runtime.process_guard import Guarded, shell_exit_code

TIMEOUT_S = 1800
"""Seconds that a process waits for the others, as the trainers do (`ddp_timeout`). NCCL's ten minutes are too
few where the others wait for rank 0's samples."""
POLL_S = 0.1
FIRST_S = 3.0
RESUME = "the same command resumes"


def launched() -> bool:
    """True if a launcher (this file's, torchrun, accelerate) started this process."""
    # A cluster may set the other two for every process of a pod.
    return {"RANK", "WORLD_SIZE", "LOCAL_RANK"} <= os.environ.keys()


def world_size() -> int:
    return int(os.environ["WORLD_SIZE"]) if launched() else 1


def rank() -> int:
    return int(os.environ["RANK"]) if launched() else 0


def is_main() -> bool:
    """True for the process that writes artifacts, checkpoints and messages."""
    return rank() == 0


def check_gpus(processes: int | None = None) -> None:
    """Raise ConfigError if this machine has fewer GPUs than processes, or several for one.

    processes: that will train on this machine; by default those that do.
    """
    import torch

    gpus = torch.cuda.device_count()
    processes = processes or int(os.environ.get("LOCAL_WORLD_SIZE", world_size()))
    if gpus > 1 and processes == 1:
        raise ConfigError(
            f"{gpus} GPUs are visible to one process",
            f"use them: launch.processes={gpus}; or choose one: CUDA_VISIBLE_DEVICES=0",
        )
    if 0 < gpus < processes:
        raise ConfigError(f"launch.processes {processes}: there are {gpus} GPUs", "lower it")


@contextmanager
def together() -> Iterator[None]:
    """Context of what all processes do: the first says what all find wrong, and its end ends the others."""
    try:
        yield
    except Exception as error:
        if not is_main():
            time.sleep(FIRST_S)
        if "gloo" not in str(error) and type(error).__name__ != "DistBackendError":
            raise
        reason = " ".join(str(error).split())[:300]
        raise ServerError(f"another process of this stage has ended: {reason}", RESUME) from error


def barrier() -> None:
    """Wait until every process has come to this point."""
    if world_size() > 1:
        _connect().wait_for_everyone()


def all_equal(value: Any) -> bool:
    """True if `value` is the same in all processes."""
    if world_size() == 1:
        return True
    from accelerate.utils import gather_object

    _connect()
    return len(set(gather_object([value]))) == 1


def _connect() -> Any:
    """Join the other processes and take this one's GPU, once. Returns accelerate's state."""
    import torch
    from accelerate import PartialState

    return PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(seconds=TIMEOUT_S))


def run(command: list[str], processes: int) -> int:
    """Run a command in so many processes of this machine, and return the exit code of one that failed, or 0.

    The first that fails ends the others; OutOfMemoryError if the system killed it.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    environment = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    environment |= dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(processes))
    if environment.pop(resources.THREADS, None):  # so many are for a process alone
        del environment["OMP_NUM_THREADS"]
    environment.setdefault("OMP_NUM_THREADS", str(max(1, resources.usable_cores() // processes)))
    workers: list[Guarded] = []
    try:
        for number in map(str, range(processes)):
            workers.append(Guarded(command, env=environment | {"RANK": number, "LOCAL_RANK": number}))
        while True:
            codes = [worker.poll() for worker in workers]
            failed = {rank: shell_exit_code(code) for rank, code in enumerate(codes) if code}
            for rank, code in failed.items():
                if code == 128 + signal.SIGKILL:
                    raise OutOfMemoryError(
                        f"process {rank} was killed, probably for lack of memory",
                        "the same command resumes; lower per_device_train_batch_size if it happens again",
                    )
            if failed or None not in codes:
                return max(failed.values(), default=0)
            time.sleep(POLL_S)
    finally:
        for worker in workers:
            assert worker.stdin is not None
            worker.stdin.close()  # all of them begin to end before one is waited for
        for worker in workers:
            worker.end()
