"""Runs the steps of a table as Slurm jobs, one for each artifact; each waits for those that make its inputs.

Nothing stays running on the login node: a later call looks at the queue, and submits what is missing again.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from stages.errors import ConfigError, MissingInputError
from stages.sweep.steps import Node, Place

REQUEUED = 20
"""How often a job may come to the end of its time and go on."""
PATIENCE_S = 120
"""How long before the end of its time a job is told."""


class Call:
    """What a job runs. Told that its time ends, or preempted, it is queued again and goes on where it was."""

    def __init__(self, command: list[str]) -> None:
        self.command = command
        self._child: subprocess.Popen[bytes] | None = None

    def __call__(self) -> None:
        self._child = subprocess.Popen([sys.executable, "-m", "lorapar_cli", *self.command])
        code = self._child.wait()
        if code:
            raise SystemExit(code)

    def checkpoint(self) -> Any:
        """Called by submitit in the job, which then asks Slurm for another run of it."""
        from submitit.helpers import DelayedSubmission

        if self._child is not None:
            self._child.terminate()
            self._child.wait()
        return DelayedSubmission(Call(self.command))


class Cluster:
    """The jobs of a sweep, recorded in a file beside their logs."""

    def __init__(self, folder: Path, settings: dict[str, dict[str, Any]], say: Callable[[str], None]) -> None:
        """settings: of `default` and of each stage, as submitit's SlurmExecutor takes them."""
        self.folder, self.settings, self.say = folder, settings, say
        self.record = folder / "jobs.json"
        found = json.loads(self.record.read_text(encoding="utf-8")) if self.record.is_file() else {}
        self.jobs: dict[str, str] = found
        """Place, as one text → number of its job."""

    def submit(self, nodes: dict[Place, Node]) -> dict[Place, str]:
        """The job of each step that is not there yet; those that are queued or running stay as they are."""
        self.folder.mkdir(parents=True, exist_ok=True)
        alive = queued()
        of: dict[Place, str] = {}
        for place, node in nodes.items():
            if node.current:
                continue
            name = "/".join(place)
            known = self.jobs.get(name)
            if known is not None and known in alive:
                self.say(f"job {known} is {alive[known].lower()}: {node.title}")
            else:
                known = self._job(node, [of[before] for before in node.inputs if before in of])
                again = " again" if name in self.jobs else ""
                self.jobs[name] = known
                self.record.write_text(json.dumps(self.jobs, indent=1), encoding="utf-8")
                self.say(f"job {known} submitted{again}: {node.title}")
            of[place] = known
        return of

    def _job(self, node: Node, after: list[str]) -> str:
        from submitit import SlurmExecutor

        executor = SlurmExecutor(self.folder / "slurm", max_num_timeout=REQUEUED)
        given = {**self.settings.get("default", {}), **self.settings.get(node.stage, {})}
        extra = {"kill-on-invalid-dep": "yes", **given.pop("additional_parameters", {})}
        executor.update_parameters(
            job_name=f"lorapar-{node.stage}",
            stderr_to_stdout=True,
            signal_delay_s=PATIENCE_S,
            additional_parameters=extra,
            **({"dependency": f"afterok:{':'.join(after)}"} if after else {}),
            **given,
        )
        return str(executor.submit(Call(node.command)).job_id)


def queued() -> dict[str, str]:
    """Number → state of this person's jobs that have not ended; from squeue, which needs no accounting."""
    try:
        done = subprocess.run(
            ["squeue", "--me", "--noheader", "--format=%A %T"], capture_output=True, text=True, check=True
        )
    except FileNotFoundError:
        raise MissingInputError("no squeue here", "--slurm is for a machine that submits to Slurm") from None
    except subprocess.CalledProcessError as error:
        raise MissingInputError(f"squeue failed: {error.stderr.strip()}") from None
    pairs = (line.split() for line in done.stdout.splitlines())
    return {number: state for number, state in pairs}


def settings(path: Path, stages: list[str]) -> dict[str, dict[str, Any]]:
    """A person's own file: `default` and stages, each with partition, time (in minutes), gpus_per_node, …"""
    if not path.is_file():
        raise MissingInputError(f"no file {path} with settings for Slurm")
    try:
        from submitit import SlurmExecutor
    except ImportError:
        raise ConfigError("--slurm needs the package submitit", "pip install 'lorapar[slurm]'") from None
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    allowed = SlurmExecutor._valid_parameters()
    choice = f"choose from {', '.join(sorted(allowed))}"
    wrong = []
    for name, part in tree.items() if isinstance(tree, dict) else [(type(tree).__name__, None)]:
        if name not in ("default", *stages) or not isinstance(part, dict):
            wrong.append(f"{name}: expected default or a stage, with settings below it")
        else:
            wrong += [f"{name}.{key}: {choice}" for key in part.keys() - allowed]
    if wrong:
        raise ConfigError("\n  ".join([f"{path}: {len(wrong)} mistakes", *wrong]))
    return dict(tree)
