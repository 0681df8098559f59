"""`lorapar sweep`: runs the missing steps of tables of many runs. `report.py` shows the results."""

import os
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import typer

from lorapar_cli import terminal, worker
from lorapar_cli.options import Overrides, Quiet, flag
from lorapar_cli.tables import show, table
from stages import escaping
from stages.config.yaml import parse_yaml
from stages.errors import ConfigError, LoraparError
from stages.runtime import gpu
from stages.sweep.file import MAX_CELLS
from stages.sweep.graph import ArtifactId, Node, build_graph, measured
from stages.sweep.local import Executor, Outcome, Workers, run
from stages.sweep.slurm import HINT, Cluster
from stages.sweep.table import Cell, Table
from stages.sweep.table import table as load_table

MAX_JOBS = 1024
TablePaths = Annotated[
    list[Path], typer.Argument(metavar="TABLE…", help="YAML files; lorapar init --example copies one.")
]
Base = Annotated[
    Path | None, typer.Option(metavar="CONFIG", help="Use this config instead of the table's own.")
]
Rows = Annotated[
    list[str] | None,
    typer.Option("--only", metavar="ROW", help="Only this row, or rows that match this pattern; repeatable."),
]
Columns = Annotated[
    list[str] | None,
    typer.Option(
        "--column", metavar="COLUMN", help="Only this column, or columns that match this pattern; repeatable."
    ),
]
Seeds = Annotated[
    str | None, typer.Option(metavar="N,N", help="Use these seeds instead of the table's, comma-separated.")
]
Devices = Annotated[
    str | None,
    typer.Option(
        metavar="N,N", help="Run one step at a time on each of these GPUs; 0+1,2+3 gives two to each step."
    ),
]
Slurm = Annotated[
    list[str] | None,
    typer.Option(
        metavar="KEY=VALUE",
        help="Make each step a Slurm job with this parameter of submitit (or STAGE.KEY); repeatable.",
    ),
]
MaxCells = Annotated[
    int, typer.Option(metavar="N", min=1, help="Refuse tables of more cells (rows times seeds).")
]


def command(
    paths: TablePaths,
    base: Base = None,
    only: Rows = None,
    column: Columns = None,
    seeds: Seeds = None,
    set_: Overrides = None,
    max_cells: MaxCells = MAX_CELLS,
    jobs: Annotated[
        int | None, typer.Option(help="Steps at a time on this machine.", min=1, max=MAX_JOBS)
    ] = None,
    devices: Devices = None,
    slurm: Slurm = None,
    dry_run: Annotated[bool, flag("--dry-run", help="Only print what would be done.")] = False,
    quiet: Quiet = False,
) -> None:
    choice = {"base": base, "only": only, "columns": column, "overrides": set_, "max_cells": max_cells}
    tables = load_tables(paths, seeds, **choice)
    cells = [cell for table in tables for cell in table.cells]
    nodes = build_graph(cells)
    slots, logs = _slots(jobs, devices), Path(cells[0].config.runs_dir) / "sweeps"
    if not quiet or dry_run:
        _announce(cells, nodes, measured(nodes), len(slots))
    if not dry_run:
        executor: Executor = Workers(slots, worker.begin, worker.make_step)
        if slurm:
            executor = Cluster(logs / "jobs", _parameters(slurm), jobs or MAX_JOBS)
        outcomes = run(nodes, executor, logs, terminal.say)
        _report_failures(outcomes, len(cells))
        terminal.say(f"next: lorapar report {' '.join(escaping.shell(str(p)) for p in paths)} --out report")


def _slots(jobs: int | None, devices: str | None) -> list[str | None]:
    """Return the CUDA_VISIBLE_DEVICES of each step that may run at a time; None leaves it as it is."""
    if devices is None:
        return [None] * (jobs or 1)
    if jobs:
        raise ConfigError("--jobs cannot be combined with --devices", "a device runs one step at a time")
    slots = [",".join(number.strip() for number in slot.split("+")) for slot in devices.split(",")]
    numbers = [number for slot in slots for number in slot.split(",")]
    if "" in numbers:
        raise ConfigError(
            f"--devices {devices}: expected numbers, separated by commas", "0+1,2+3 gives each step two"
        )
    if repeated := [number for number in numbers if numbers.count(number) > 1]:
        raise ConfigError(f"--devices {devices}: {repeated[0]} is named twice")
    visible = os.environ.get(gpu.VISIBLE)
    if visible is not None and (hidden := set(numbers) - set(visible.split(","))):
        raise ConfigError(f"--devices {devices}: {min(hidden)} is not in {gpu.VISIBLE}={visible}")
    return list(slots)


def _parameters(texts: list[str]) -> dict[str, Any]:
    """The parameters in KEY=VALUE texts."""
    pairs = [text.partition("=") for text in texts]
    if wrong := [key for key, equals, _ in pairs if not equals]:
        raise ConfigError(f"--slurm {wrong[0]}: expected KEY=VALUE", HINT)
    return {key.strip(): parse_yaml(value, f"--slurm {key}") for key, _, value in pairs}


def load_tables(paths: list[Path], seeds: str | None, **selection: Any) -> list[Table]:
    """Load the tables. A single error combines all mistakes.

    selection: keyword arguments of `stages.sweep.table.table`.
    """
    tables, errors = [], []
    for path in paths:
        try:
            tables.append(load_table(path, seeds=_numbers(seeds), **selection))
        except LoraparError as error:
            errors.append(error)
    if len(errors) > 1:
        kind = type(errors[0]) if len({type(error) for error in errors}) == 1 else ConfigError
        hints = dict.fromkeys(error.hint for error in errors if error.hint)
        raise kind("\n".join(dict.fromkeys(str(error) for error in errors)), "; ".join(hints) or None)
    if errors:
        raise errors[0]
    return tables


def _numbers(text: str | None) -> list[int] | None:
    try:
        return [int(number) for number in text.split(",")] if text else None
    except ValueError:
        raise ConfigError(f"--seeds {text}: expected numbers, separated by commas") from None


def _announce(
    cells: list[Cell], nodes: dict[ArtifactId, Node], seconds: dict[str, float], slots: int
) -> None:
    """Print how many steps there are to do, and how long they take.

    seconds: stage → seconds per step, for stages that have been measured. slots: steps at a time.
    """
    to_do = Counter(node.stage for node in nodes.values() if not node.current)
    of_stages = ", ".join(f"{number} × {stage}" for stage, number in to_do.items()) or "none"
    terminal.conclude(f"{len(cells)} cells share {len(nodes)} steps; to do: {of_stages}")
    if known := [stage for stage in to_do if stage in seconds]:
        total = sum(to_do[stage] * seconds[stage] for stage in known)
        at_a_time = f", {slots} at a time" if slots > 1 else ""
        unknown = "" if len(known) == len(to_do) else ", plus steps of unknown length"
        terminal.say(f"together about {terminal.duration(total / slots)}{at_a_time}{unknown}")


def _report_failures(outcomes: list[Outcome], cells: int) -> None:
    """Print each step that failed, with the reason, and exit with the code of the first one."""
    if not outcomes:
        terminal.nothing_to_do()
    unfinished = [outcome for outcome in outcomes if outcome.status != "done"]
    if not unfinished:
        return
    failures = table("step", "status", "code", "why, for which cells", text="why, for which cells")
    for outcome in unfinished:
        step = outcome.node.step
        reason = "a step that it needs failed"
        if outcome.log:
            reason = f"see {outcome.log}"
        needed_by = "; ".join(f"{row}, seed {seed}" for _, row, seed in outcome.node.cells)
        code = "" if outcome.code is None else str(outcome.code)
        failures.add_row(f"{step.name} {step.key}", outcome.status, code, f"{reason} ({needed_by})")
    show(failures)
    incomplete = {cell for outcome in unfinished for cell in outcome.node.cells}
    terminal.conclude(f"{len(incomplete)} of {cells} cells are not complete; the same command resumes")
    raise typer.Exit(next((o.code for o in unfinished if o.code is not None and o.code > 0), 1))
