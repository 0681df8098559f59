"""`lorapar eval`: grades targets on the benchmarks of a config, or on tasks of lm-evaluation-harness."""

from pathlib import Path
from typing import Annotated

import typer

from lorapar_cli import terminal
from lorapar_cli.harness import entries
from lorapar_cli.options import (
    ConfigPath,
    Force,
    Json,
    Overrides,
    Quiet,
    Unsafe,
    plan_of,
    without_sandbox,
)
from lorapar_cli.stage import make_alone
from stages.errors import ConfigError
from stages.store.artifacts import Store


def command(
    config: ConfigPath,
    set_: Overrides = None,
    only: Annotated[
        list[str] | None, typer.Option("--benchmark", help="Only this benchmark; repeatable.")
    ] = None,
    harness: Annotated[str | None, typer.Option(help="lm-eval: run tasks of lm-evaluation-harness.")] = None,
    tasks: Annotated[str | None, typer.Option(help="Tasks of --harness, separated by commas.")] = None,
    task_files: Annotated[Path | None, typer.Option(help="Folder with your own task files.")] = None,
    limit: Annotated[int | None, typer.Option(help="Use the first N items of each task.", min=1)] = None,
    unsafe: Unsafe = False,
    force: Force = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    overrides = [*(set_ or []), *without_sandbox(unsafe, "eval")]
    if harness is not None:
        if harness != "lm-eval" or not tasks:
            raise ConfigError(f"--harness {harness}: expected --harness lm-eval --tasks NAME,…")
        if only:
            raise ConfigError("--benchmark cannot be combined with --harness")
        by_benchmark = entries(tasks, task_files, limit)
        overrides += by_benchmark.values()
        only = list(by_benchmark)
    elif tasks or task_files or limit:
        raise ConfigError("--tasks, --task-files and --limit need --harness lm-eval")
    settings, steps = plan_of(config, overrides)
    chosen = only or list(settings.eval.benchmarks)
    if unknown := set(chosen) - set(settings.eval.benchmarks):
        raise ConfigError(
            f"no benchmark {sorted(unknown)[0]}", f"choose from: {', '.join(settings.eval.benchmarks)}"
        )
    evaluations = [s for s in steps.values() if s.stage.name == "eval"]
    evaluations = [s for s in evaluations if s.variant.partition("@")[2] in chosen]
    if not evaluations:
        raise ConfigError(
            "nothing to evaluate",
            "set eval.benchmarks; without data.path, also eval.targets=[base]",
        )
    make_alone(settings, evaluations, force, quiet, as_json)
    if not as_json:
        terminal.results(Store(settings.root), evaluations)
