"""A worker of `sweep`: a process that stays, and makes one step after the other."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from lorapar_cli import options
from lorapar_cli.errors import report_failure
from lorapar_cli.process import set_up
from lorapar_cli.progress import TerminalProgress
from lorapar_cli.stage import make, make_elsewhere, processes, report
from stages.config import Config
from stages.pipeline.steps import Step
from stages.runtime import gpu, process_guard
from stages.store.artifacts import Store


def begin(device: str | None) -> None:
    """Set up the process. device: the GPUs that it may use; None leaves them as they are."""
    process_guard.end_with_parent()
    os.setsid()  # an interrupt at the terminal reaches the sweep, which ends its workers
    if device is not None:
        os.environ[gpu.VISIBLE] = device
    set_up()


def make_step(config: Config, step: Step, command: list[str], log: Path) -> int:
    """Make one step, and return the exit code that its command would have.

    command: the arguments of `lorapar` that make it, for steps that need processes of their own. log: the
    file that gets all output.
    """
    with log.open("ab") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    options.typed_config = " ".join(command[1:])
    sys.argv[1:] = command  # what the manifest says
    try:
        if number := processes(config, step):
            make_elsewhere(command, number)
        else:
            with TerminalProgress() as progress:
                make(config, Store(config.root), [step], False, progress, report)
    except Exception as problem:
        return report_failure(problem)
    finally:
        sys.stdout.flush()
    return 0
