"""`lorapar sweep`: runs the missing steps of tables of many runs. `report.py` shows the results."""

import os
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import typer

from lorapar_cli import terminal
from lorapar_cli.options import Overrides, Quiet, argument, flag, pairs, sets, value
from lorapar_cli.plan import checked_texts
from lorapar_cli.stage import begin_worker, make_step
from stages import escaping
from stages.config.yaml import parse_yaml
from stages.errors import ConfigError, DataError
from stages.runtime import gpu
from stages.store.artifacts import Store
from stages.sweep.slurm import HINT, Cluster
from stages.sweep.steps import Executor, Node, Outcome, build_graph, run
from stages.sweep.table import Cell, Table
from stages.sweep.table import table as load_table
from stages.sweep.workers import Workers

MAX_JOBS = 1024
TablePaths = Annotated[list[Path], argument("YAML files; lorapar init --example copies one.", "TABLE…")]
Base = Annotated[Path | None, value("Use this config instead of the table's own.", "CONFIG")]
Rows = Annotated[
    list[str] | None, value("Only this row, or rows that match this pattern; repeatable.", "ROW", "--only")
]
Seeds = Annotated[str | None, value("Use these seeds instead of the table's, comma-separated.", "N,N")]
Jobs = Annotated[int | None, value("Steps at a time on this machine.", min=1, max=MAX_JOBS)]
Devices = Annotated[
    str | None, value("Run one step at a time on each of these GPUs; 0+1,2+3 gives two to each step.", "N,N")
]
SLURM = "Make each step a Slurm job with this parameter of submitit (or STAGE.KEY); repeatable."
Slurm = Annotated[list[str] | None, value(SLURM, "KEY=VALUE")]
DryRun = Annotated[bool, flag("--dry-run", "Only print how much would be done.")]


def command(
    paths: TablePaths,
    base: Base = None,
    only: Rows = None,
    seeds: Seeds = None,
    set_: Overrides = None,
    jobs: Jobs = None,
    devices: Devices = None,
    slurm: Slurm = None,
    dry_run: DryRun = False,
    quiet: Quiet = False,
) -> None:
    if slurm and devices:
        raise ConfigError("--devices cannot be combined with --slurm", "gpus_per_node=1 asks for GPUs")
    tables = load_tables(paths, seeds, base=base, only=only, overrides=set_)
    cells = [cell for table in tables for cell in table.cells]
    nodes = build_graph(cells)
    slots, logs = _slots(jobs, devices), Path(cells[0].config.runs_dir) / "sweeps"
    pending = sum(not node.current for node in nodes.values())
    announce = terminal.conclude if dry_run else terminal.say
    announce(f"{len(cells)} cells share {len(nodes)} steps, {pending} of them to do")
    if not dry_run:
        executor: Executor = Workers(slots, begin_worker, make_step)
        if slurm:
            executor = Cluster(logs / "jobs", _parameters(slurm), jobs or MAX_JOBS)
        else:  # a node of the cluster may have what this machine lacks
            _check(cells, [node for node in nodes.values() if not node.current])
        outcomes = run(nodes, executor, logs, terminal.say)
        _report_failures(outcomes, len(cells))
        typed = [*map(str, paths), *selection(base, only, seeds), *sets(set_)]
        terminal.say(f"next: lorapar report {' '.join(map(escaping.shell, typed))} --out report")


def _slots(jobs: int | None, devices: str | None) -> list[str | None]:
    """Return the CUDA_VISIBLE_DEVICES of each step that may run at a time; None leaves it as it is."""
    if devices is None:
        return [None] * (jobs or 1)
    if jobs:
        raise ConfigError("--jobs cannot be combined with --devices", "a device runs one step at a time")
    slots = [",".join(number.strip() for number in slot.split("+")) for slot in devices.split(",")]
    numbers = [number for slot in slots for number in slot.split(",")]
    if "" in numbers or len(set(numbers)) < len(numbers):
        expected = "expected numbers, separated by commas, each once"
        raise ConfigError(f"--devices {devices}: {expected}", "0+1,2+3 gives each step two")
    visible = os.environ.get(gpu.VISIBLE)
    if visible is not None and (hidden := set(numbers) - set(visible.split(","))):
        raise ConfigError(f"--devices {devices}: {min(hidden)} is not in {gpu.VISIBLE}={visible}")
    return list(slots)


def _check(cells: list[Cell], nodes: list[Node]) -> None:
    """Make the check of `run` for each cell that needs one of these steps; DataError has each cause once."""
    causes: Counter[str] = Counter()
    for cell in cells:
        steps = [node.step for node in nodes if (cell.table, cell.row, cell.seed) in node.cells]
        try:
            checked_texts(cell.config, Store(cell.config.root), steps) if steps else None
        except DataError as error:
            causes[str(error)] += 1
    if causes:
        lines = [f"{number} of {len(cells)} cells: {cause}" for cause, number in causes.items()]
        raise DataError("\n".join(lines), "to go on with other rows: --only ROW")


def _parameters(texts: list[str]) -> dict[str, Any]:
    return {key: parse_yaml(text, f"--slurm {key}") for key, text in pairs(texts, "--slurm", HINT).items()}


def selection(base: Path | None, only: list[str] | None, seeds: str | None) -> list[str]:
    """Return the options that choose cells as command-line arguments."""
    typed = {"--only": only, "--base": base and [str(base)], "--seeds": seeds and [seeds]}
    return [part for name, texts in typed.items() for text in texts or () for part in (name, text)]


def load_tables(paths: list[Path], seeds: str | None, **selection: Any) -> list[Table]:
    """Load the tables. selection: keyword arguments of `stages.sweep.table.table`."""
    try:
        numbers = [int(number) for number in seeds.split(",")] if seeds else None
    except ValueError:
        raise ConfigError(f"--seeds {seeds}: expected numbers, separated by commas") from None
    return [load_table(path, seeds=numbers, **selection) for path in paths]


def _report_failures(outcomes: list[Outcome], cells: int) -> None:
    """Print each step that failed, with the reason, and exit with the code of the first one."""
    if not outcomes:
        terminal.say(terminal.NOTHING_TO_DO)
    unfinished = [outcome for outcome in outcomes if outcome.status != "done"]
    if not unfinished:
        return
    failures = []
    for outcome in unfinished:
        step = outcome.node.step
        reason = f"see {outcome.log}" if outcome.log else "a step that it needs failed"
        needed_by = "; ".join(f"{row}, seed {seed}" for _, row, seed in outcome.node.cells)
        code = "" if outcome.code is None else str(outcome.code)
        failures.append([f"{step.name} {step.key}", outcome.status, code, f"{reason} ({needed_by})"])
    head = ["step", "status", "code", "why, for which cells"]
    terminal.table(head, failures, to_left=tuple(head))
    incomplete = {cell for outcome in unfinished for cell in outcome.node.cells}
    terminal.conclude(f"{len(incomplete)} of {cells} cells are not complete; the same command resumes")
    raise typer.Exit(next((o.code for o in unfinished if o.code is not None and o.code > 0), 1))
