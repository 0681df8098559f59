"""`report`: a page on tables of many runs, or on one run."""

from pathlib import Path
from typing import Annotated

import typer

from lorapar_cli import terminal
from lorapar_cli.options import Overrides, plan_of, sets
from lorapar_cli.sweep import Base, Columns, Rows, Seeds, planned
from stages.errors import ConfigError, MissingInputError
from stages.pipeline.steps import ancestors
from stages.sweep import formats
from stages.sweep.file import is_table
from stages.sweep.results import results


def command(
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
    if lost := [path for path in paths if not path.is_file()]:
        raise MissingInputError(f"no file {lost[0]}", "name table files, as in configs/tables, or one config")
    if is_table(paths[0]):
        _of_tables(paths, out, base, only, column, seeds, set_)
    elif len(paths) > 1 or base or only or column or seeds:
        raise ConfigError(f"{paths[0]} is no table", "a page is on tables, or on one config alone")
    else:
        _of_run(paths[0], out, set_)


def _of_run(path: Path, out: Path, set_: list[str] | None) -> None:
    from stages.report import run_page

    settings, steps = plan_of(path, set_)
    out.mkdir(parents=True, exist_ok=True)
    again = ["run", str(path), *sets(set_)]
    text = run_page.page(settings, ancestors(steps, None), formats.command(again))
    (out / "report.html").write_text(text, encoding="utf-8")
    terminal.say(f"{out / 'report.html'}")


def _of_tables(
    paths: list[Path],
    out: Path,
    base: Path | None,
    only: list[str] | None,
    column: list[str] | None,
    seeds: str | None,
    set_: list[str] | None,
) -> None:
    from stages.report import table_page

    if len({path.stem for path in paths}) < len(paths):
        raise ConfigError("two tables have the same name, and would be written to the same files")
    tables = planned(paths, base, only, column, seeds, set_)
    out.mkdir(parents=True, exist_ok=True)
    options = ["--base", str(base)] if base else []
    options += _options("--column", column)
    options += ["--seeds", seeds] if seeds else []
    options += sets(set_)
    made = []
    for path, table in zip(paths, tables, strict=True):
        found = results(table)
        again = {row: ["sweep", str(path), *_options("--only", [row]), *options] for row in table.rows}
        whole = ["sweep", str(path), *_options("--only", only), *options]
        rows = {row: formats.command(one) for row, one in again.items()}
        made.append((found, table_page.Commands(formats.command(whole), rows)))
        (out / f"{path.stem}.csv").write_text(formats.csv_text(found), encoding="utf-8")
        (out / f"{path.stem}.tex").write_text(formats.latex(found), encoding="utf-8")
        missing = sum(value is None for value in found.values.values())
        terminal.say(f"{path}: {len(found.values) - missing} of {len(found.values)} values are there")
    written = "\n".join(formats.markdown(found, commands.all) for found, commands in made)
    (out / "report.md").write_text(written, encoding="utf-8")
    (out / "report.html").write_text(table_page.page(made), encoding="utf-8")
    terminal.say(f"{out / 'report.html'}, report.md, and a .csv and .tex of each table")


def _options(name: str, values: list[str] | None) -> list[str]:
    return [part for value in values or () for part in (name, value)]
