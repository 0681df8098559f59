"""Runs the steps of a table as Slurm jobs, one for each artifact; each waits for those that make its inputs.

Nothing stays running on the login node: a later call looks at the queue, and submits what is missing again.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from filelock import FileLock
from pydantic import TypeAdapter, ValidationError

from stages.config.yaml import values
from stages.errors import ArtifactError, ConfigError, MissingInputError, ServerError
from stages.runtime.process_guard import guarded
from stages.sweep.graph import PLANNED, Node, Place
from stages.sweep.local import BUSY, is_current

REQUEUED = 20
"""How often a job may come to the end of its time and go on."""
PATIENCE_S = 120
"""How long before the end of its time a job is told."""
PAUSE = 60.0
"""Seconds before a step is tried again that another process is making."""
OURS = {"dependency", "job_name", "signal_delay_s", "stderr_to_stdout", "teardown", "use_srun"}
"""Parameters of submitit that are no one else's to set."""
OURS_OF_SLURM = {"dependency", "job-name", "job_name", "signal", "no-requeue", "array"}
"""The same among `additional_parameters`, which submitit writes last."""
FAILED = "ended without its artifact"
MOST_MINUTES = 60 * 24 * 31
"""More is no time in minutes: YAML reads 24:00:00 as 86,400."""
KINDS: dict[str, type] = {"time": int, "setup": list, "srun_args": list, "additional_parameters": dict}
"""What a text would pass for until a job is submitted."""


class Call:
    """What a job runs. Told that its time ends, it is queued again and goes on where it was.

    Slurm signals every process of a job. The step ignores that: it is ended by its guard, which ends its
    servers, too.
    """

    def __init__(self, command: list[str], planned: str) -> None:
        """planned: the key that it is to make."""
        self.command, self.planned = command, planned
        self._child: subprocess.Popen[bytes] | None = None

    def __call__(self) -> None:
        while (code := self._run()) == BUSY:
            time.sleep(PAUSE)
        if code:
            raise SystemExit(code)

    def _run(self) -> int:
        self._child = subprocess.Popen(
            guarded([sys.executable, "-m", "lorapar_cli", *self.command]),
            stdin=subprocess.PIPE,
            preexec_fn=_deaf,
            env=os.environ | {PLANNED: self.planned},
        )
        # Not Popen.wait: it holds a lock, and `checkpoint` interrupts it to wait for the same child.
        status = os.waitpid(self._child.pid, 0)[1]
        self._child = None
        return os.waitstatus_to_exitcode(status)

    def checkpoint(self) -> Any:
        """Called by submitit from a signal handler; what this returns is then run by the requeued job."""
        from submitit.helpers import DelayedSubmission

        if self._child is not None:
            assert self._child.stdin is not None
            self._child.stdin.close()
            with contextlib.suppress(ChildProcessError):  # it had ended before we were told
                os.waitpid(self._child.pid, 0)
        return DelayedSubmission(Call(self.command, self.planned))


def _deaf() -> None:
    for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, signal.SIGCONT):
        signal.signal(number, signal.SIG_IGN)


class Cluster:
    """The jobs of a sweep, recorded in a file beside their logs."""

    def __init__(self, folder: Path, settings: dict[str, dict[str, Any]], say: Callable[[str], None]) -> None:
        """settings: of `default` and of each stage, as submitit's SlurmExecutor takes them."""
        self.folder, self.settings, self.say = folder, settings, say
        self.record = folder / "jobs.json"
        self.jobs: dict[str, str] = {}
        """Place, as one text → number of its job."""

    def submit(self, nodes: dict[Place, Node]) -> dict[Place, str]:
        """The job of each step that is not there yet.

        One that is queued or running stays as it is, unless it waits for a job that is gone.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with FileLock(self.folder / "jobs.lock"):
            self.jobs = self._recorded()
            alive = queued()
            of: dict[Place, str] = {}
            new: set[Place] = set()
            for place, node in nodes.items():
                if node.current:
                    continue
                known = self.jobs.get("/".join(place))
                here = known is not None and alive.get((known, _name(node)))
                if known is not None and here and not new & set(node.inputs):
                    self.say(f"job {known} is {here.lower()}: {node.title}")
                    of[place] = known
                    continue
                if known is not None and not here and is_current(node, {}):
                    continue  # it ended after the steps were looked at
                if known is not None:
                    self._again(known, node, bool(here))
                of[place] = self._job(node, [of[before] for before in node.inputs if before in of])
                new.add(place)
                self._remember("/".join(place), of[place])
                self.say(f"job {of[place]} submitted: {node.title}")
            return of

    def look(self, nodes: dict[Place, Node]) -> dict[str, int]:
        """Say how the job of each step stands, and submit nothing; how many steps stand so."""
        self.jobs = self._recorded()
        alive = queued()
        counts: dict[str, int] = {}
        for place, node in nodes.items():
            known = self.jobs.get("/".join(place))
            how = "there" if node.current else alive.get((known or "", _name(node)), "").lower()
            if not how and known is None:
                how = "not submitted"
            elif not how:  # it may have ended after the steps were looked at
                how = "there" if is_current(node, {}) else FAILED
            counts[how] = counts.get(how, 0) + 1
            if how == FAILED:
                self.say(f"job {known} {FAILED}{self._seen(known or '')}: {node.title}")
            elif how != "there":
                self.say(f"{how}{f', job {known}' if known else ''}: {node.title}")
        return counts

    def _recorded(self) -> dict[str, str]:
        if not self.record.is_file():
            return {}
        try:
            return TypeAdapter(dict[str, str]).validate_json(self.record.read_bytes())
        except ValidationError:
            raise ArtifactError(
                f"{self.record} is no record of jobs",
                "move it away; jobs that are still queued would then be submitted again: scancel them",
            ) from None

    def _again(self, known: str, node: Node, here: bool) -> None:
        """Say why a step is submitted anew, and take back the job that waits in vain."""
        if here:
            subprocess.run(["scancel", known], check=False)
            return
        self.say(f"job {known} {FAILED}{self._seen(known)}: {node.title}")

    def _seen(self, job: str) -> str:
        log = self.folder / "slurm" / f"{job}_0_log.out"
        return f"; see {log}" if log.is_file() else ", and never ran"

    def _remember(self, name: str, job: str) -> None:
        self.jobs[name] = job
        draft = self.record.with_suffix(".draft")
        draft.write_text(json.dumps(self.jobs, indent=1), encoding="utf-8")
        draft.replace(self.record)

    def _job(self, node: Node, after: list[str]) -> str:
        from submitit import SlurmExecutor
        from submitit.core.utils import FailedJobError, FailedSubmissionError

        executor = SlurmExecutor(self.folder / "slurm", max_num_timeout=REQUEUED)
        given = {**self.settings.get("default", {}), **self.settings.get(node.stage, {})}
        extra = {"kill-on-invalid-dep": "yes", **given.pop("additional_parameters", {})}
        try:
            executor.update_parameters(
                job_name=_name(node),
                stderr_to_stdout=True,
                signal_delay_s=PATIENCE_S,
                additional_parameters=extra,
                **({"dependency": f"afterok:{':'.join(after)}"} if after else {}),
                **given,
            )
            return str(executor.submit(Call(node.command, node.step.key)).job_id)
        except (TypeError, ValueError) as error:
            raise ConfigError(
                f"submitit takes no such settings: {error}", "see the file of --slurm"
            ) from None
        except (FailedJobError, FailedSubmissionError) as error:
            raise ServerError(f"Slurm refuses {node.title}: {error}", "see the file of --slurm") from None


def _name(node: Node) -> str:
    return f"lorapar-{node.stage}-{node.step.key}"


def queued() -> dict[tuple[str, str], str]:
    """Number and name → state of this person's jobs that have not ended; squeue needs no accounting."""
    command = ["squeue", "--me", "--noheader", "--format=%A %T %j"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except FileNotFoundError:
        raise MissingInputError("no squeue here", "--slurm is for a machine that submits to Slurm") from None
    except subprocess.CalledProcessError as error:
        raise ServerError(f"squeue failed: {error.stderr.strip()}") from None
    lines = (line.split(maxsplit=2) for line in done.stdout.splitlines())
    # Other lines name a cluster, or a job without a name.
    return {(parts[0], parts[2]): parts[1] for parts in lines if len(parts) == 3 and parts[0].isdecimal()}


def settings(path: Path, stages: list[str]) -> dict[str, dict[str, Any]]:
    """A person's own file: `default` and stages, each with partition, time (in minutes), gpus_per_node, …"""
    if not path.is_file():
        raise MissingInputError(f"no file {path} with settings for Slurm")
    try:
        from submitit import SlurmExecutor
    except ImportError:
        raise ConfigError("--slurm needs the package submitit", "pip install 'lorapar[slurm]'") from None
    tree = values(path, str(path)) or {}
    allowed = SlurmExecutor._valid_parameters() - OURS
    choice = f"choose from {', '.join(sorted(allowed))}"
    wrong = []
    for name, part in tree.items() if isinstance(tree, dict) else [(type(tree).__name__, None)]:
        if name not in ("default", *stages) or not isinstance(part, dict):
            wrong.append(f"{name}: expected default or a stage, with settings below it")
        else:
            wrong += [f"{name}.{key}: {choice}" for key in part.keys() - allowed]
            wrong += [
                f"{name}.{key}: expected {kind.__name__}, got {part[key]!r}"
                for key, kind in KINDS.items()
                if not isinstance(part.get(key, kind()), kind)
            ]
            further = part.get("additional_parameters")
            wrong += [
                f"{name}.additional_parameters.{key}: lorapar sets it, or a job would not go on where it was"
                for key in sorted(OURS_OF_SLURM & further.keys() if isinstance(further, dict) else ())
            ]
            if isinstance(minutes := part.get("time", 1), int) and not 0 < minutes <= MOST_MINUTES:
                wrong.append(f"{name}.time: expected minutes, got {minutes}")
    if not wrong and "time" not in tree.get("default", {}):
        wrong.append("default.time is missing: minutes that a job may take")
    if wrong:
        raise ConfigError("\n  ".join([f"{path}: {len(wrong)} mistakes", *wrong]))
    return dict(tree)
