"""Makes the steps of a sweep as Slurm jobs, by submitit, whose local executor does without Slurm."""

import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from stages.errors import ConfigError, ServerError
from stages.runtime.process_guard import Guarded
from stages.sweep.steps import Node

MAX_REQUEUES = 20
"""How often a job may reach its time limit and be queued again."""
HINT = "--slurm KEY=VALUE takes the parameters of submitit's AutoExecutor, such as slurm_partition=gpu"


class StepCommand:
    """The work of a job: one `lorapar` command. At its time limit the job is queued again, and resumes."""

    def __init__(self, arguments: list[str], log: Path) -> None:
        self.arguments, self.log = arguments, log

    def __call__(self) -> int:
        with self.log.open("ab") as file:
            command = [sys.executable, "-m", "lorapar_cli", *self.arguments]
            options = {"stdout": file, "stderr": subprocess.STDOUT, "preexec_fn": _ignore_job_signals}
            return Guarded(command, **options).finish()

    def checkpoint(self) -> Any:
        """The work of the job when it is queued again; submitit asks in its handler of the signal."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(StepCommand(self.arguments, self.log))


def _ignore_job_signals() -> None:
    """Slurm sends them to every process of a job, and the guard ends the step when the job ends."""
    for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, signal.SIGCONT):
        signal.signal(number, signal.SIG_IGN)


class Cluster:
    """Executor whose steps are jobs of a cluster, which are cancelled if the sweep is stopped."""

    poll_s = 1.0

    def __init__(self, folder: Path, settings: dict[str, Any], most: int) -> None:
        """settings: parameters of submitit's AutoExecutor; STAGE.NAME sets one for a stage.

        `cluster: local` is not Slurm, but processes of this machine. most: number of jobs at a time.
        """
        try:
            from submitit import AutoExecutor
        except ImportError:
            raise ConfigError("--slurm needs the package submitit", "pip install 'lorapar[slurm]'") from None
        if "timeout_min" not in settings:
            raise ConfigError("--slurm timeout_min is missing: the time limit of a job, in minutes", HINT)
        self.settings, self.most = dict(settings), most
        cluster = self.settings.pop("cluster", "slurm")
        try:
            self.executor = AutoExecutor(folder, cluster, slurm_max_num_timeout=MAX_REQUEUES)
        except (RuntimeError, ValueError) as error:
            raise ConfigError(f"--slurm: {error}", "start the sweep where sbatch and srun are") from None
        self.jobs: list[Any] = []

    @property
    def has_room(self) -> bool:
        self.jobs = [job for job in self.jobs if not job.done()]
        return len(self.jobs) < self.most

    def submit(self, node: Node, log: Path) -> Any:
        from submitit.core.utils import FailedJobError, FailedSubmissionError

        parameters = {"name": f"lorapar-{node.stage}-{node.step.key}"}
        parameters |= {name: value for name, value in self.settings.items() if "." not in name}
        for name, value in self.settings.items():
            if name.startswith(f"{node.stage}."):
                parameters[name.partition(".")[2]] = value
        try:
            self.executor.update_parameters(**parameters)
            self.jobs.append(self.executor.submit(StepCommand(node.command, log)))
        except (AssertionError, NameError, TypeError, ValueError) as error:
            raise ConfigError(f"--slurm: {error}", HINT) from None
        except (FailedJobError, FailedSubmissionError) as error:
            raise ServerError(f"Slurm refuses {node.title}: {error}", HINT) from None
        return self.jobs[-1]

    def close(self, interrupted: bool) -> None:
        for job in self.jobs if interrupted else ():
            with suppress(OSError):
                job.cancel(check=False)
