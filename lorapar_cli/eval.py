"""`lorapar eval`: grades targets on the benchmarks of a config."""

from typing import Annotated

from lorapar_cli import terminal
from lorapar_cli.options import (
    ConfigPath,
    Force,
    Json,
    Overrides,
    Quiet,
    Unsafe,
    plan_of,
    value,
    without_sandbox,
)
from lorapar_cli.stage import make_alone
from stages.errors import ConfigError

Benchmarks = Annotated[list[str] | None, value("Only this benchmark; repeatable.", None, "--benchmark")]


def command(
    config: ConfigPath,
    set_: Overrides = None,
    only: Benchmarks = None,
    unsafe: Unsafe = False,
    force: Force = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    settings, steps, store = plan_of(config, [*(set_ or []), *without_sandbox(unsafe, "eval")])
    benchmarks = list(settings.eval.benchmarks)
    if unknown := set(only or ()) - set(benchmarks):
        raise ConfigError(f"no benchmark {sorted(unknown)[0]}", f"choose from: {', '.join(benchmarks)}")
    evaluations = [s for s in steps.values() if s.stage.name == "eval"]
    evaluations = [s for s in evaluations if s.variant.partition("@")[2] in (only or benchmarks)]
    if not evaluations:
        raise ConfigError(
            "nothing to evaluate", "set eval.benchmarks; without data.path, also eval.targets=[base]"
        )
    make_alone(settings, store, evaluations, force, as_json)
    if not as_json:
        terminal.results(store, evaluations)
