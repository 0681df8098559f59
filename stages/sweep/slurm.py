"""Runs the steps of a sweep as Slurm jobs, one per artifact; each job depends on those that make its inputs.

Nothing stays running on the login node: a later call looks at the queue and submits again what is missing.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock
from pydantic import TypeAdapter, ValidationError

from stages.config.yaml import read_yaml
from stages.errors import ArtifactError, ConfigError, MissingInputError, ServerError
from stages.pipeline import launch
from stages.runtime.process_guard import Guarded
from stages.store.digests import replace_file
from stages.sweep.file import mistakes_error
from stages.sweep.graph import ArtifactId, Node
from stages.sweep.local import BUSY, is_current

MAX_REQUEUES = 20
"""How often a job may reach its time limit and be requeued."""
SIGNAL_BEFORE_END_S = 120
"""Seconds between the signal to a job and its time limit."""
RETRY_AFTER_S = 60.0
"""Seconds until a job retries a step that another process is making."""
RESERVED = {"dependency", "job_name", "signal_delay_s", "stderr_to_stdout", "teardown", "use_srun"}
"""Parameters of submitit that a settings file must not set."""
RESERVED_BY_SBATCH_NAME = {"dependency", "job-name", "job_name", "signal", "no-requeue", "array"}
"""The same among `additional_parameters`, which submitit writes last, so that they would win."""
CURRENT, NOT_SUBMITTED, FAILED = "current", "not submitted", "ended without its artifact"
"""States of a node beside those of its job."""
SEE_FILE = "see the file given with --slurm"
MAX_MINUTES = 60 * 24 * 31
"""A larger time is a mistake: YAML reads 24:00:00 as 86,400."""
TYPES: dict[str, type] = {"time": int, "setup": list, "srun_args": list, "additional_parameters": dict}
"""Types that submitit itself does not check before a job is submitted."""


class Call:
    """The function that a job runs: one `lorapar` command. At the time limit, it is requeued and resumes.

    Slurm signals every process of a job. The step ignores that signal: its guard ends it, and its servers.
    """

    def __init__(self, command: list[str], expected_key: str) -> None:
        """expected_key: the cache key that the command must make."""
        self.command, self.expected_key = command, expected_key
        self._child: Guarded | None = None

    def __call__(self) -> None:
        while (code := self._run()) == BUSY:
            time.sleep(RETRY_AFTER_S)
        if code:
            raise SystemExit(code)

    def _run(self) -> int:
        self._child = Guarded(
            [sys.executable, "-m", "lorapar_cli", *self.command],
            preexec_fn=_ignore_job_signals,
            env=os.environ | {launch.EXPECTED_KEYS: self.expected_key},
        )
        # Not Popen.wait: it holds a lock, and `checkpoint` interrupts it to wait for the same child.
        status = os.waitpid(self._child.pid, 0)[1]
        self._child = None
        return os.waitstatus_to_exitcode(status)

    def checkpoint(self) -> Any:
        """End the step and return what the requeued job runs; submitit calls this from a signal handler."""
        from submitit.helpers import DelayedSubmission

        if self._child is not None:
            assert self._child.stdin is not None
            self._child.stdin.close()
            with contextlib.suppress(ChildProcessError):  # it ended before the signal
                os.waitpid(self._child.pid, 0)
        return DelayedSubmission(Call(self.command, self.expected_key))


def _ignore_job_signals() -> None:
    for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, signal.SIGCONT):
        signal.signal(number, signal.SIG_IGN)


class Cluster:
    """The Slurm jobs of a sweep, recorded in a file beside their logs."""

    def __init__(self, folder: Path, settings: dict[str, dict[str, Any]], say: Callable[[str], None]) -> None:
        """settings: `default` or stage → parameters of submitit's SlurmExecutor."""
        self.folder, self.settings, self.say = folder, settings, say
        self.record = folder / "jobs.json"
        self.jobs: dict[str, str] = {}
        """Artifact id, joined by `/` → number of the last job that was submitted for it."""

    def submit(self, nodes: dict[ArtifactId, Node]) -> dict[ArtifactId, str]:
        """Submit a job for each missing artifact, and return artifact → job.

        A job that is queued or running is kept, unless a job that it depends on is submitted again.
        """
        for node in nodes.values():
            self._check_gpus(node)
        self.folder.mkdir(parents=True, exist_ok=True)
        with FileLock(self.folder / "jobs.lock"):
            self.jobs = self._read_record()
            queue = queued()
            job_of: dict[ArtifactId, str] = {}
            submitted: set[ArtifactId] = set()
            for artifact, node in nodes.items():  # in topological order: inputs come first
                job, status = self._status(node, queue)
                if status == CURRENT:
                    continue
                is_queued = status not in (NOT_SUBMITTED, FAILED)
                if is_queued and not submitted & set(node.inputs):
                    self.say(f"job {job} is {status}: {node.title}")
                    job_of[artifact] = job
                    continue
                if is_queued:
                    subprocess.run(["scancel", job], check=False)  # its dependency can never be satisfied
                dependencies = [job_of[upstream] for upstream in node.inputs if upstream in job_of]
                job_of[artifact] = self._submit_job(node, dependencies)
                submitted.add(artifact)
                self.jobs["/".join(artifact)] = job_of[artifact]
                replace_file(self.record, json.dumps(self.jobs, indent=1).encode())
                self.say(f"job {job_of[artifact]} submitted: {node.title}")
            return job_of

    def _check_gpus(self, node: Node) -> None:
        """Raise ConfigError if a stage would get several GPUs and use one."""
        gpus = {**self.settings.get("default", {}), **self.settings.get(node.stage, {})}.get("gpus_per_node")
        launched = launch.settings_of(node.config, node.step.stage)
        if isinstance(gpus, int) and gpus > 1 and launched and not launched.is_distributed:
            raise ConfigError(
                f"a job of {node.stage} has {gpus} GPUs (gpus_per_node), and {node.stage} uses one",
                f"set {node.stage}.launch.backend to ddp, or {node.stage}: {{gpus_per_node: 1}} for Slurm",
            )

    def report(self, nodes: dict[ArtifactId, Node]) -> dict[str, int]:
        """Print the state of each artifact's job, and submit none; return state → number of artifacts."""
        self.jobs = self._read_record()
        queue = queued()
        counts: Counter[str] = Counter()
        for node in nodes.values():
            job, status = self._status(node, queue)
            counts[status] += 1
            if status not in (CURRENT, FAILED):
                self.say(f"{status}{f', job {job}' if job else ''}: {node.title}")
        return counts

    def _status(self, node: Node, queue: dict[tuple[str, str], str]) -> tuple[str, str]:
        """The number of a node's job, empty if there is none, and its state; a failed one is reported."""
        job = self.jobs.get("/".join(node.id), "")
        if node.current:
            return job, CURRENT
        if status := queue.get((job, _job_name(node))):
            return job, status.lower()
        if not job:
            return job, NOT_SUBMITTED
        if is_current(node):  # the job ended after the graph was built
            return job, CURRENT
        log = self.folder / "slurm" / f"{job}_0_log.out"
        hint = f"; see {log}" if log.is_file() else ", and never ran"
        self.say(f"job {job} {FAILED}{hint}: {node.title}")
        return job, FAILED

    def _read_record(self) -> dict[str, str]:
        if not self.record.is_file():
            return {}
        try:
            return TypeAdapter(dict[str, str]).validate_json(self.record.read_bytes())
        except ValidationError:
            raise ArtifactError(
                f"{self.record} is not a record of jobs",
                "scancel jobs that are still queued, or they are submitted twice; then move the file away",
            ) from None

    def _submit_job(self, node: Node, dependencies: list[str]) -> str:
        """Submit the job of a node, to start after `dependencies` have succeeded, and return its number."""
        from submitit import SlurmExecutor
        from submitit.core.utils import FailedJobError, FailedSubmissionError

        executor = SlurmExecutor(self.folder / "slurm", max_num_timeout=MAX_REQUEUES)
        parameters = {**self.settings.get("default", {}), **self.settings.get(node.stage, {})}
        extra = {"kill-on-invalid-dep": "yes", **parameters.pop("additional_parameters", {})}
        try:
            executor.update_parameters(
                job_name=_job_name(node),
                stderr_to_stdout=True,
                signal_delay_s=SIGNAL_BEFORE_END_S,
                additional_parameters=extra,
                **({"dependency": f"afterok:{':'.join(dependencies)}"} if dependencies else {}),
                **parameters,
            )
            return str(executor.submit(Call(node.command, node.step.key)).job_id)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"submitit rejects the settings: {error}", SEE_FILE) from None
        except (FailedJobError, FailedSubmissionError) as error:
            raise ServerError(f"Slurm refuses {node.title}: {error}", SEE_FILE) from None


def _job_name(node: Node) -> str:
    return f"lorapar-{node.stage}-{node.step.key}"


def queued() -> dict[tuple[str, str], str]:
    """Map number and name of this user's jobs that have not ended to their state.

    squeue, unlike sacct, works on clusters without accounting.
    """
    command = ["squeue", "--me", "--noheader", "--format=%A %T %j"]
    try:
        squeue = subprocess.run(command, capture_output=True, text=True, errors="replace", check=True)
    except FileNotFoundError:
        raise MissingInputError(
            "squeue is not installed here", "--slurm is for a machine that submits to Slurm"
        ) from None
    except subprocess.CalledProcessError as error:
        raise ServerError(f"squeue failed: {error.stderr.strip()}") from None
    rows = (line.split(maxsplit=2) for line in squeue.stdout.splitlines())
    # Skip lines that name a cluster, or a job without a name.
    return {(row[0], row[2]): row[1] for row in rows if len(row) == 3 and row[0].isdecimal()}


def settings(path: Path, stages: list[str]) -> dict[str, dict[str, Any]]:
    """Read a settings file: `default` or stage → parameters of submitit, such as time (in minutes)."""
    if not path.is_file():
        raise MissingInputError(f"no file {path} with settings for Slurm")
    try:
        from submitit import SlurmExecutor
    except ImportError:
        raise ConfigError("--slurm needs the package submitit", "pip install 'lorapar[slurm]'") from None
    tree = read_yaml(path, str(path)) or {}
    allowed = SlurmExecutor._valid_parameters() - RESERVED
    mistakes = []
    for name, section in tree.items() if isinstance(tree, dict) else [(type(tree).__name__, None)]:
        if name not in ("default", *stages) or not isinstance(section, dict):
            mistakes.append(f"{name}: expected default or a stage, with settings below it")
        else:
            mistakes += _section_mistakes(name, section, allowed)
    if not mistakes and "time" not in tree.get("default", {}):
        mistakes.append("default.time is missing: the time limit of a job, in minutes")
    if mistakes:
        raise mistakes_error(path, mistakes)
    return dict(tree)


def _section_mistakes(name: str, section: dict[str, Any], allowed: set[str]) -> Iterator[str]:
    for key in section.keys() - allowed:
        yield f"{name}.{key}: choose from {', '.join(sorted(allowed))}"
    for key, kind in TYPES.items():
        if not isinstance(section.get(key, kind()), kind):
            yield f"{name}.{key}: expected {kind.__name__}, got {section[key]!r}"
    extra = section.get("additional_parameters")
    for key in sorted(RESERVED_BY_SBATCH_NAME & extra.keys() if isinstance(extra, dict) else ()):
        yield f"{name}.additional_parameters.{key}: lorapar sets it, so that jobs can resume"
    if section.get("nodes", 1) != 1:
        yield f"{name}.nodes: a job has one node; on several, torchrun starts a stage: docs/clusters.md"
    if isinstance(minutes := section.get("time", 1), int) and not 0 < minutes <= MAX_MINUTES:
        yield f"{name}.time: expected minutes, got {minutes}"
