"""Tables of many runs: `sweep` makes what is missing of them. `report.py` shows what is there."""

import shutil
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from lorapar_cli import terminal
from lorapar_cli.options import Overrides
from lorapar_cli.stage_starter import starter
from lorapar_cli.tables import show, table
from lorapar_cli.watch import last_error, watching
from stages.errors import ConfigError, LoraparError
from stages.pipeline.stages import STAGES
from stages.sweep import slurm
from stages.sweep.graph import Node, Place, build_graph, measured
from stages.sweep.local import Outcome, Sweep
from stages.sweep.table import Cell, Table
from stages.sweep.table import table as cells_of

TablePaths = Annotated[list[Path], typer.Argument(metavar="TABLE…", help="YAML files; see configs/tables/.")]
Base = Annotated[
    Path | None, typer.Option(metavar="CONFIG", help="Use this config in place of the table's own.")
]
Rows = Annotated[
    list[str] | None,
    typer.Option("--only", metavar="ROW", help="Only this row, or those that fit a pattern; repeatable."),
]
Columns = Annotated[
    list[str] | None,
    typer.Option(
        "--column",
        metavar="COLUMN",
        help="Only this column, or those that fit a pattern, and what it is made from; repeatable.",
    ),
]
Seeds = Annotated[
    str | None, typer.Option(metavar="N,N", help="These seeds in place of the table's, separated by commas.")
]


def command(
    paths: TablePaths,
    base: Base = None,
    only: Rows = None,
    column: Columns = None,
    seeds: Seeds = None,
    set_: Overrides = None,
    jobs: Annotated[int | None, typer.Option(help="Steps at a time on this machine.", min=1)] = None,
    devices: Annotated[
        str | None,
        typer.Option(metavar="N,N", help="One step at a time on each of these GPUs; 0+1,2+3 gives each two."),
    ] = None,
    cluster: Annotated[
        Path | None,
        typer.Option("--slurm", metavar="FILE", help="As Slurm jobs, with the settings in this file."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say what would be done; with --slurm, how the jobs stand.")
    ] = False,
) -> None:
    """Make what is missing of tables; steps that their cells share are made once."""
    found = planned(paths, base, only, column, seeds, set_)
    cells = [cell for one in found for cell in one.cells]
    nodes = build_graph(cells)
    logs = Path(cells[0].config.runs_dir) / "sweeps"
    if cluster is not None and (jobs or devices):
        raise ConfigError("--slurm goes without --jobs and --devices", "its file says what a job gets")
    places = _places(jobs, devices)
    seconds = measured(nodes)
    _announce(cells, nodes, seconds, 1 if cluster else len(places))
    if cluster is not None and dry_run and not shutil.which("squeue"):
        terminal.say("no squeue here: how jobs stand can be seen on a machine that submits to Slurm")
    elif cluster is not None:
        _by_slurm(slurm.Cluster(logs, _settings(cluster), terminal.say), cells, nodes, dry_run)
    elif not dry_run:
        view, say, look = watching(sys.stderr.isatty(), seconds)
        with view, starter() as stages:
            ended = Sweep(nodes, places, logs, say, look, stages.start).run()
        _close(ended, len(cells))


def _places(jobs: int | None, devices: str | None) -> list[str | None]:
    """What each step that runs at a time has for CUDA_VISIBLE_DEVICES: None, a number, or several."""
    if devices is None:
        return [None] * (jobs or 1)
    if jobs:
        raise ConfigError("--jobs and --devices exclude each other", "a device runs one step at a time")
    places = [",".join(part.strip() for part in slot.split("+")) for slot in devices.split(",")]
    numbers = [number for place in places for number in place.split(",")]
    if "" in numbers:
        raise ConfigError(
            f"--devices {devices}: expected numbers, separated by commas", "0+1,2+3 gives each step two"
        )
    if twice := [number for number in numbers if numbers.count(number) > 1]:
        raise ConfigError(f"--devices {devices}: {twice[0]} is there twice")
    return list(places)


def _settings(cluster: Path) -> dict[str, dict[str, Any]]:
    return slurm.settings(cluster, [stage.name for stage in STAGES.values()])


def _by_slurm(jobs: slurm.Cluster, cells: list[Cell], nodes: dict[Place, Node], dry_run: bool) -> None:
    """Submit what is missing, or only say how it stands; the exit code then tells of jobs that failed."""
    if any(cell.config.eval.engine == "transformers" for cell in cells):
        terminal.say(
            "evaluations are by transformers, as the config says or because this machine has no GPU; where "
            "jobs have one, name eval.engine: vllm, which is part of what is kept"
        )
    if dry_run:
        counts = jobs.look(nodes)
        terminal.say(", ".join(f"{number} {how}" for how, number in counts.items()))
        if counts.get(slurm.FAILED):
            raise typer.Exit(1)
    elif waiting := jobs.submit(nodes):
        terminal.say(
            f"{len(waiting)} steps are with Slurm; the same command with --dry-run says how they stand"
        )
    else:
        terminal.nothing_to_do()


def planned(
    paths: list[Path],
    base: Path | None,
    only: list[str] | None,
    columns: list[str] | None,
    seeds: str | None,
    set_: list[str] | None,
) -> list[Table]:
    """The tables; one error has what is wrong with any of them."""
    found, wrong = [], []
    for path in paths:
        try:
            found.append(_planned(path, base, only, columns, seeds, set_))
        except LoraparError as error:
            wrong.append(error)
    if len(wrong) > 1:
        kind = type(wrong[0]) if len({type(error) for error in wrong}) == 1 else ConfigError
        hints = dict.fromkeys(error.hint for error in wrong if error.hint)
        raise kind("\n".join(dict.fromkeys(str(error) for error in wrong)), "; ".join(hints) or None)
    if wrong:
        raise wrong[0]
    return found


def _planned(
    path: Path,
    base: Path | None,
    only: list[str] | None,
    columns: list[str] | None,
    seeds: str | None,
    set_: list[str] | None,
) -> Table:
    """The table; says which of its rows another base, or fewer columns, make the same."""
    found = cells_of(path, base, only, _numbers(seeds), set_, columns)
    why = f"with {base}" if base else "in these columns"
    for row, other in found.same.items():
        terminal.say(f"{path}: {why}, row {row!r} is the same as {other!r} and is left out")
    return found


def _numbers(text: str | None) -> list[int] | None:
    try:
        return [int(part) for part in text.split(",")] if text else None
    except ValueError:
        raise ConfigError(f"--seeds {text}: expected numbers, separated by commas") from None


def _announce(cells: list[Cell], nodes: dict[Place, Node], seconds: dict[str, float], places: int) -> None:
    """How much there is to do, by stage.

    seconds: of a step of each stage, as far as they are known. places: steps at a time.
    """
    drawn = table("stage", "steps", "of cells", "there", "to do", "takes about")
    total, known = 0.0, True
    for stage in dict.fromkeys(node.stage for node in nodes.values()):
        mine = [node for node in nodes.values() if node.stage == stage]
        todo = sum(not node.current for node in mine)
        each = seconds.get(stage)
        total, known = total + todo * (each or 0), known and (each is not None or not todo)
        told = "" if not todo else "not known" if each is None else terminal.duration(todo * each)
        sharing = len({cell for node in mine for cell in node.cells})
        drawn.add_row(stage, *map(str, (len(mine), sharing, len(mine) - todo, todo)), told)
    show(drawn)
    asked = sum(len(node.cells) for node in nodes.values())
    terminal.say(f"{len(cells)} cells share {len(nodes)} steps; run one by one they would take {asked}")
    if any(not node.current for node in nodes.values()):
        told = (
            f"together about {terminal.duration(total / places)}"
            if total
            else "how long it takes is not known"
        )
        at_a_time = f", {places} at a time" if places > 1 and total else ""
        terminal.say(told + at_a_time + (" and what is not known" if total and not known else ""))


def _close(ended: list[Outcome], cells: int) -> None:
    """Say what failed, and why; the exit code is that of the first step that did."""
    bad = [outcome for outcome in ended if outcome.how != "done"]
    if not ended:
        terminal.nothing_to_do()
    if not bad:
        return
    drawn = table("step", "how", "code", "why, for which cells", text="why, for which cells")
    for outcome in bad:
        why = "what it needs failed"
        if outcome.log:
            last = "made something else: its inputs have changed"
            why = f"{last_error(outcome.log, outcome.begins) if outcome.code else last}; see {outcome.log}"
        of = "; ".join(f"{row}, seed {seed}" for _, row, seed in outcome.node.cells)
        code = "" if outcome.code is None else str(outcome.code)
        drawn.add_row(f"{outcome.node.step.name} {outcome.node.step.key}", outcome.how, code, f"{why} ({of})")
    show(drawn)
    lost = {cell for outcome in bad for cell in outcome.node.cells}
    terminal.say(f"{len(lost)} of {cells} cells are not complete; the same command goes on")
    raise typer.Exit(next((o.code for o in bad if o.code is not None and o.code > 0), 1))
