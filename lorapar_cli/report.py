"""`lorapar report`: writes a page on tables of many runs, or on one run."""

from pathlib import Path
from typing import Annotated

import typer

from lorapar_cli import terminal
from lorapar_cli.options import Overrides, plan_of, sets, typed
from lorapar_cli.sweep import Base, Columns, MaxCells, Rows, Seeds, load_tables
from stages import escaping
from stages.errors import ConfigError, MissingInputError
from stages.pipeline.state import current_artifact
from stages.pipeline.steps import ancestors
from stages.store.artifacts import Store, refuse_store
from stages.sweep.file import MAX_CELLS, is_table
from stages.sweep.results import results
from stages.sweep.table import Table


def command(
    paths: Annotated[list[Path], typer.Argument(metavar="FILE…", help="Table files, or one config.")],
    out: Annotated[Path, typer.Option(help="Folder for report.html and, of tables, a .csv of each.")],
    base: Base = None,
    only: Rows = None,
    column: Columns = None,
    seeds: Seeds = None,
    set_: Overrides = None,
    max_cells: MaxCells = MAX_CELLS,
) -> None:
    if missing := [path for path in paths if not path.is_file()]:
        raise MissingInputError(
            f"no file {missing[0]}", "name table files, or one config; examples: lorapar list examples"
        )
    options = ["--base", str(base)] if base else []
    options += [argument for name in column or () for argument in ("--column", name)]
    options += ["--seeds", seeds] if seeds else []
    options += ["--max-cells", str(max_cells)] if max_cells != MAX_CELLS else []
    if is_table(paths[0]):
        refuse_store(out)
        if len({path.stem for path in paths}) < len(paths):
            raise ConfigError("two tables have the same name, and would be written to the same files")
        choice = {"base": base, "only": only, "columns": column, "overrides": set_, "max_cells": max_cells}
        tables = load_tables(paths, seeds, **choice)
        rows = [argument for row in only or () for argument in ("--only", row)]
        _report_tables(tables, out, [*rows, *options, *sets(set_)])
    elif len(paths) > 1 or only or options:
        raise ConfigError(
            f"{paths[0]} is not a table",
            "name tables, or one config without --base, --only, --column, --seeds and --max-cells",
        )
    else:
        _report_run(paths[0], out, set_)


def _report_run(path: Path, out: Path, set_: list[str] | None) -> None:
    refuse_store(out)
    settings, steps = plan_of(path, set_)
    requested = ancestors(steps, None)
    store = Store(settings.root)
    arguments = typed(path, set_)
    if not any(current_artifact(store, step) for step in requested.values()):
        raise MissingInputError(
            f"nothing to report: no step of {path} is current", f"lorapar run {arguments}"
        )
    from stages.report import files, run_page

    page = out / "report.html"
    files.refuse_others([page])
    files.write({page: run_page.page(settings, requested, f"lorapar run {arguments}")})
    terminal.say(str(page))


def _report_tables(tables: list[Table], out: Path, options: list[str]) -> None:
    """Write the files of tables. options: arguments of a `lorapar sweep` that completes them."""

    def sweep(*paths: Path) -> str:
        return " ".join(map(escaping.shell, ["lorapar", "sweep", *map(str, paths), *options]))

    all_results = [results(table) for table in tables]
    if not any(table_results.any_there for table_results in all_results):
        hint = sweep(*(table.path for table in tables))
        raise MissingInputError("nothing to report: no value of these tables is there yet", hint)
    from stages.report import files, table_page

    page = out / "report.html"
    commands = [(table_results, sweep(table_results.table.path)) for table_results in all_results]
    texts = {out / f"{each.table.path.stem}.csv": table_page.csv_text(each) for each in all_results}
    files.refuse_others([page, *texts])
    texts[page] = table_page.page(commands)
    files.write(texts)
    for each in all_results:
        values = each.values.values()
        complete = sum(value is not None for value in values)
        terminal.say(f"{each.table.path}: {complete} of {len(values)} values are available")
    terminal.say(f"{page}, and a .csv of each table")
