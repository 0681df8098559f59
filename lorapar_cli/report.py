"""`lorapar report`: writes a page on tables of many runs, or on one run or two, or prints their results."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

from lorapar_cli import options, terminal
from lorapar_cli.options import Json, Overrides, argument, plan_of, sets, value
from lorapar_cli.sweep import Base, Rows, Seeds, load_tables, selection
from stages import escaping
from stages.errors import ConfigError, MissingInputError
from stages.pipeline.state import current_artifact
from stages.pipeline.steps import ancestors
from stages.report import comparison
from stages.report.page import write
from stages.store.artifacts import refuse_store
from stages.sweep.file import is_table
from stages.sweep.results import results
from stages.sweep.table import Table


def command(
    paths: Annotated[list[Path], argument("Table files, or one config, or two to compare.", "FILE…")],
    out: Annotated[Path | None, value("Folder for report.html and a .csv of each table; or --json.")] = None,
    base: Base = None,
    only: Rows = None,
    seeds: Seeds = None,
    set_: Overrides = None,
    as_json: Json = False,
) -> None:
    if (out is None) != as_json:
        raise ConfigError("report takes --out or --json", "--out DIR for a page, --json for the numbers")
    if missing := [path for path in paths if not path.is_file()]:
        raise MissingInputError(
            f"no file {missing[0]}", "name table files, or configs; examples: lorapar list examples"
        )
    if out is not None:
        refuse_store(out)
    arguments = selection(base, only, seeds)
    if is_table(paths[0]):
        if len({path.stem for path in paths}) < len(paths):
            raise ConfigError("two tables have the same name")
        tables = load_tables(paths, seeds, base=base, only=only, overrides=set_)
        _report_tables(tables, out, [*arguments, *sets(set_)])
    elif len(paths) > 2 or arguments or any(map(is_table, paths)):
        raise ConfigError(
            f"{paths[0]} is not a table",
            "name one config, or two; tables compare more: lorapar init --example tables/order",
        )
    elif len(paths) == 2:
        _report_two_runs(paths, out, set_)
    else:
        _report_run(paths[0], out, set_)


def _report_run(path: Path, out: Path | None, set_: list[str] | None) -> None:
    settings, steps, store = plan_of(path, set_)
    requested, again = ancestors(steps, None), f"lorapar run {options.typed_config}"
    if not any(current_artifact(store, step) for step in requested.values()):
        raise MissingInputError(f"nothing to report: no step of {path} is current", again)
    if out is None:
        evaluations = comparison.evaluations(requested.values())
        measures = comparison.measured(store, evaluations, "system")
        print(json.dumps({name: list(map(asdict, of_benchmark)) for name, of_benchmark in measures.items()}))
        return
    from stages.report import run_page

    page = out / "report.html"
    write({page: run_page.page(settings, requested, again)})
    terminal.say(str(page))


def _report_two_runs(paths: list[Path], out: Path | None, set_: list[str] | None) -> None:
    configs, answers = [], []
    for path in paths:
        config, steps, store = plan_of(path, set_)
        answers.append(comparison.answers_of(store, comparison.evaluations(steps.values()), "system"))
        if not answers[-1]:
            raise MissingInputError(
                f"nothing to compare: no evaluation of {path} is current",
                f"lorapar run {options.typed_config}",
            )
        configs.append(config)
    from stages.report import two_runs

    compared, names = two_runs.pairs(*answers), [str(path) for path in paths]
    if out is None:
        columns = ("first", "second", "difference")
        print(json.dumps({
            benchmark: {t: dict(zip(columns, map(asdict, values), strict=True)) for t, values in of.items()}
            for benchmark, of in compared.items()
        }))  # fmt: skip
        return
    page = out / "report.html"
    write({page: two_runs.page(configs, names, compared)})
    terminal.say(str(page))


def _report_tables(tables: list[Table], out: Path | None, arguments: list[str]) -> None:
    """Write the files of tables. arguments: of a `lorapar sweep` that completes them, after their names."""

    def sweep(*paths: Path) -> str:
        return " ".join(map(escaping.shell, ["lorapar", "sweep", *map(str, paths), *arguments]))

    all_results = [results(table) for table in tables]
    if not any(table_results.any_there for table_results in all_results):
        hint = sweep(*(table.path for table in tables))
        raise MissingInputError("nothing to report: no value of these tables is there yet", hint)
    from stages.report import table_page

    if out is None:
        print(json.dumps({each.table.path.stem: list(table_page.records(each)) for each in all_results}))
        return
    page = out / "report.html"
    commands = [(table_results, sweep(table_results.table.path)) for table_results in all_results]
    texts = {out / f"{each.table.path.stem}.csv": table_page.csv_text(each) for each in all_results}
    write({**texts, page: table_page.page(commands)})
    for each in all_results:
        complete = sum(value is not None for value in each.values.values())
        planned = {(cell.row, name) for cell in each.table.cells for name in cell.columns}
        terminal.say(f"{each.table.path}: {complete} of {len(planned)} values are available")
    terminal.say(f"{page}, and a .csv of each table")
