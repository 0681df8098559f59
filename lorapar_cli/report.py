"""`lorapar report`: writes a page on tables of many runs, or on one run."""

from pathlib import Path
from typing import Annotated

import typer

from lorapar_cli import terminal
from lorapar_cli.options import Overrides, plan_of, sets, typed
from lorapar_cli.sweep import Base, Columns, MaxCells, Rows, Seeds, load_tables
from stages.errors import ConfigError, MissingInputError
from stages.pipeline.state import state
from stages.pipeline.steps import ancestors
from stages.store.artifacts import Store, refuse_store
from stages.sweep import formats
from stages.sweep.file import MAX_CELLS, is_table
from stages.sweep.results import results


def command(
    paths: Annotated[list[Path], typer.Argument(metavar="FILE…", help="Table files, or one config.")],
    out: Annotated[
        Path, typer.Option(help="Folder for report.html and, of tables, report.md, .csv and .tex.")
    ],
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
    if is_table(paths[0]):
        _report_tables(paths, out, base, only, column, seeds, set_, max_cells)
    elif len(paths) > 1 or base or only or column or seeds or max_cells != MAX_CELLS:
        raise ConfigError(
            f"{paths[0]} is not a table",
            "name tables, or one config without --base, --only, --column, --seeds and --max-cells",
        )
    else:
        _report_run(paths[0], out, set_)


def _report_run(path: Path, out: Path, set_: list[str] | None) -> None:
    from stages.report import run_page

    refuse_store(out)
    settings, steps = plan_of(path, set_)
    requested = ancestors(settings, steps, None)
    store = Store(settings.root)
    if not any(state(store, step).state == "current" for step in requested.values()):
        arguments = typed(path, set_)
        raise MissingInputError(
            f"nothing to report: no step of {path} is current", f"lorapar run {arguments}"
        )
    out.mkdir(parents=True, exist_ok=True)
    run, serve = (formats.command([verb, str(path), *sets(set_)]) for verb in ("run", "serve"))
    text = run_page.page(settings, requested, run, serve)
    (out / "report.html").write_text(text, encoding="utf-8")
    terminal.say(f"{out / 'report.html'}")


def _report_tables(
    paths: list[Path],
    out: Path,
    base: Path | None,
    only: list[str] | None,
    column: list[str] | None,
    seeds: str | None,
    set_: list[str] | None,
    max_cells: int,
) -> None:
    from stages.report import table_page

    refuse_store(out)
    if len({path.stem for path in paths}) < len(paths):
        raise ConfigError("two tables have the same name, and would be written to the same files")
    tables = load_tables(paths, base, only, column, seeds, set_, max_cells)
    options = ["--base", str(base)] if base else []
    options += _options("--column", column)
    options += ["--seeds", seeds] if seeds else []
    options += ["--max-cells", str(max_cells)] if max_cells != MAX_CELLS else []
    options += sets(set_)
    all_results = [results(table) for table in tables]
    if not any(table_results.any_there for table_results in all_results):
        hint = formats.command(["sweep", *map(str, paths), *_options("--only", only), *options])
        raise MissingInputError("nothing to report: no value of these tables is there yet", hint)
    out.mkdir(parents=True, exist_ok=True)
    sections = []
    for path, table, table_results in zip(paths, tables, all_results, strict=True):
        sweep = ["sweep", str(path)]
        row_commands = {row: formats.command([*sweep, "--only", row, *options]) for row in table.rows}
        table_command = formats.command([*sweep, *_options("--only", only), *options])
        commands = table_page.Commands(table_command, row_commands)
        sections.append((table_results, commands))
        (out / f"{path.stem}.csv").write_text(formats.csv_text(table_results), encoding="utf-8")
        (out / f"{path.stem}.tex").write_text(formats.latex(table_results), encoding="utf-8")
        values = table_results.values.values()
        complete = sum(value is not None for value in values)
        terminal.say(f"{path}: {complete} of {len(values)} values are available")
    text = "\n".join(formats.markdown(table_results, commands.all) for table_results, commands in sections)
    (out / "report.md").write_text(text, encoding="utf-8")
    (out / "report.html").write_text(table_page.page(sections), encoding="utf-8")
    terminal.say(f"{out / 'report.html'}, report.md, and a .csv and .tex of each table")


def _options(name: str, values: list[str] | None) -> list[str]:
    """Return a repeatable option with each of its values."""
    return [argument for value in values or () for argument in (name, value)]
