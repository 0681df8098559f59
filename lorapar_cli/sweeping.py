"""Commands for tables of many runs: `sweep` makes what is missing, `report` shows what is there."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from lorapar_cli import render
from lorapar_cli.options import Overrides, plan_of, sets
from lorapar_cli.tables import show, table
from lorapar_cli.watch import watching
from stages.errors import ConfigError
from stages.pipeline.plan import asked_for
from stages.pipeline.table import STAGES
from stages.sweep import formats, slurm
from stages.sweep.file import is_table
from stages.sweep.local import Outcome, Sweep
from stages.sweep.results import results
from stages.sweep.steps import Node, Place, measured, union
from stages.sweep.table import Table
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


def sweep(
    paths: TablePaths,
    base: Base = None,
    only: Rows = None,
    column: Columns = None,
    seeds: Seeds = None,
    set_: Overrides = None,
    jobs: Annotated[int | None, typer.Option(help="Steps at a time on this machine.", min=1)] = None,
    devices: Annotated[
        str | None, typer.Option(metavar="N,N", help="One step at a time on each of these GPUs.")
    ] = None,
    cluster: Annotated[
        Path | None,
        typer.Option("--slurm", metavar="FILE", help="As Slurm jobs, with the settings in this file."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be done.")] = False,
) -> None:
    """Make what is missing of tables; steps that their cells share are made once."""
    found = [_planned(path, base, only, column, seeds, set_) for path in paths]
    cells = [cell for one in found for cell in one.cells]
    nodes = union(cells)
    seconds = measured(nodes)
    _announce(len(cells), nodes, seconds)
    if dry_run:
        return
    logs = Path(cells[0].config.runs_dir) / "sweeps"
    if cluster is not None:
        if jobs or devices:
            raise ConfigError("--slurm goes without --jobs and --devices", "its file says what a job gets")
        given = slurm.settings(cluster, [stage.name for stage in STAGES.values()])
        waiting = slurm.Cluster(logs, given, render.say).submit(nodes)
        if waiting:
            render.say(f"{len(waiting)} steps are with Slurm; the same command says how they stand")
        else:
            render.nothing_to_do()
        return
    places: list[str | None] = (
        [part.strip() for part in devices.split(",")] if devices else [None] * (jobs or 1)
    )
    if "" in places:
        raise ConfigError(f"--devices {devices}: expected numbers, separated by commas")
    if devices and jobs:
        raise ConfigError("--jobs and --devices exclude each other", "a device runs one step at a time")
    view, say, look = watching(sys.stderr.isatty(), seconds)
    with view:
        ended = Sweep(nodes, places, logs, say, look).run()
    _close(ended, len(cells))


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
        render.say(f"{path}: {why}, row {row!r} is the same as {other!r} and is left out")
    return found


def _numbers(text: str | None) -> list[int] | None:
    try:
        return [int(part) for part in text.split(",")] if text else None
    except ValueError:
        raise ConfigError(f"--seeds {text}: expected numbers, separated by commas") from None


def _announce(cells: int, nodes: dict[Place, Node], seconds: dict[str, float]) -> None:
    """How much there is to do, by stage. seconds: of a step of each stage, as far as they are known."""
    drawn = table("stage", "steps", "there", "to do", "takes about")
    total, known = 0.0, True
    for stage in dict.fromkeys(node.stage for node in nodes.values()):
        mine = [node for node in nodes.values() if node.stage == stage]
        todo = sum(not node.current for node in mine)
        each = seconds.get(stage)
        total, known = total + todo * (each or 0), known and (each is not None or not todo)
        told = "" if not todo else "not known" if each is None else render.duration(todo * each)
        drawn.add_row(stage, str(len(mine)), str(len(mine) - todo), str(todo), told)
    show(drawn)
    asked = sum(len(node.cells) for node in nodes.values())
    render.say(f"{cells} cells share {len(nodes)} steps; run one by one they would take {asked}")
    if any(not node.current for node in nodes.values()):
        told = f"together about {render.duration(total)}" if total else "how long it takes is not known"
        render.say(told + (" and what is not known" if total and not known else ""))


def _close(ended: list[Outcome], cells: int) -> None:
    """Say what failed; the exit code is that of the first step that did."""
    bad = [outcome for outcome in ended if outcome.how != "done"]
    if not ended:
        render.nothing_to_do()
    for outcome in bad:
        code = "" if outcome.code is None else f" with exit code {outcome.code}; see {outcome.log}"
        render.say(f"{outcome.how}{code}: {outcome.node.title}")
    if bad:
        lost = {cell for outcome in bad for cell in outcome.node.cells}
        render.say(f"{len(lost)} of {cells} cells are not complete; the same command goes on")
        raise typer.Exit(next((o.code for o in bad if o.code is not None and o.code > 0), 1))


def report(
    paths: Annotated[
        list[Path], typer.Argument(metavar="FILE…", help="Table files, or the config of one run.")
    ],
    out: Annotated[
        Path, typer.Option(help="Folder for report.html, report.md, and a .csv and .tex of each table.")
    ],
    base: Base = None,
    only: Rows = None,
    column: Columns = None,
    seeds: Seeds = None,
    set_: Overrides = None,
) -> None:
    """Write a page on tables, with intervals, beside the published values, or on one run."""
    from stages.report import of_run, of_tables

    out.mkdir(parents=True, exist_ok=True)
    if not is_table(paths[0]):
        if len(paths) > 1 or base or only or column or seeds:
            raise ConfigError(f"{paths[0]} is no table", "a page is on tables, or on one config alone")
        settings, steps = plan_of(paths[0], set_)
        again = ["run", str(paths[0]), *sets(set_)]
        text = of_run.page(settings, asked_for(steps, None), formats.command(again))
        (out / "report.html").write_text(text, encoding="utf-8")
        render.say(f"{out / 'report.html'}")
        return
    if len({path.stem for path in paths}) < len(paths):
        raise ConfigError("two tables have the same name, and would be written to the same files")
    made = []
    for path in paths:
        found = results(_planned(path, base, only, column, seeds, set_))
        again = ["sweep", str(path), *(["--base", str(base)] if base else [])]
        again += [part for row in only or () for part in ("--only", row)]
        again += [part for name in column or () for part in ("--column", name)]
        again += ["--seeds", seeds] if seeds else []
        again += sets(set_)
        made.append((found, formats.command(again)))
        (out / f"{path.stem}.csv").write_text(formats.csv_text(found), encoding="utf-8")
        (out / f"{path.stem}.tex").write_text(formats.latex(found), encoding="utf-8")
        missing = sum(value is None for value in found.values.values())
        render.say(f"{path}: {len(found.values) - missing} of {len(found.values)} values are there")
    written = "\n".join(formats.markdown(*one) for one in made)
    (out / "report.md").write_text(written, encoding="utf-8")
    (out / "report.html").write_text(of_tables.page(made), encoding="utf-8")
    render.say(f"{out / 'report.html'}, report.md, and a .csv and .tex of each table")
