"""`lorapar eval`: grades targets on the benchmarks of a config."""

from typing import Annotated

import typer

from lorapar_cli import terminal
from lorapar_cli.options import ConfigPath, Force, Json, Overrides, Quiet, Unsafe, plan_of, without_sandbox
from lorapar_cli.stage import make_alone
from stages.errors import ConfigError
from stages.store.artifacts import Store


def command(
    config: ConfigPath,
    set_: Overrides = None,
    only: Annotated[
        list[str] | None, typer.Option("--benchmark", help="Only this benchmark; repeatable.")
    ] = None,
    unsafe: Unsafe = False,
    force: Force = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    overrides = [*(set_ or []), *without_sandbox(unsafe, "eval")]
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
            "nothing to evaluate", "set eval.benchmarks; without data.path, also eval.targets=[base]"
        )
    make_alone(settings, evaluations, force, as_json)
    if not as_json:
        terminal.results(Store(settings.root), evaluations)
