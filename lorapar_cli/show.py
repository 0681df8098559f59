"""`lorapar show`: a manifest, graded samples, or the table of results."""

from typing import Annotated

import typer

from lorapar_cli import terminal
from lorapar_cli.options import ConfigPath, Json, Overrides, flag, plan_of, typed
from stages.errors import ConfigError, MissingInputError
from stages.pipeline.state import current_artifact, require_current, state
from stages.pipeline.steps import Step
from stages.store.artifacts import Store


def command(
    config: ConfigPath,
    stage: Annotated[
        str | None, typer.Argument(help="A stage, eval:TARGET or eval:TARGET@BENCHMARK; none: the results.")
    ] = None,
    set_: Overrides = None,
    samples: Annotated[
        bool,
        flag(
            "--samples",
            help="Show graded answers of an evaluation (eval:TARGET); --wrong and --limit imply it.",
        ),
    ] = False,
    wrong: Annotated[bool, flag("--wrong", help="Show only samples that are not correct.")] = False,
    by: Annotated[
        str | None, typer.Option(help="Split the results by this field of the test rows; system if left out.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="How many samples; 5 if left out.")] = None,
    as_json: Json = False,
) -> None:
    """Show an artifact's manifest, graded samples, or the table of results."""
    settings, steps = plan_of(config, set_)
    store = Store(settings.root)
    evaluations = [step for step in steps.values() if step.stage.name == "eval"]
    samples |= wrong or limit is not None
    if samples and (stage is None or not stage.startswith("eval")):
        names = ", ".join(step.name for step in evaluations)
        raise ConfigError("--samples, --wrong and --limit go with an evaluation", f"choose from: {names}")
    if stage is None:
        _show_results(store, evaluations, by, as_json, typed(config, set_))
        return
    if by is not None:
        raise ConfigError(
            "--by goes with the results of all evaluations", f"lorapar show {typed(config, set_)} --by {by}"
        )
    named = [s for name, s in steps.items() if stage in (name, s.stage.name) or name.startswith(f"{stage}@")]
    if not named:
        raise ConfigError(f"no stage {stage!r}", f"choose from: {', '.join(steps)}")
    for step in named:
        now = state(store, step)
        artifact = now.artifact if now.state == "stale" and now.artifact else require_current(store, step)
        if now.state == "stale":
            terminal.say(f"{step.name} is stale: {now.why}")
        if samples:
            terminal.samples(artifact, wrong, limit or 5, as_json)
        else:
            terminal.manifest(artifact, as_json)


def _show_results(store: Store, evaluations: list[Step], by: str | None, as_json: bool, config: str) -> None:
    """Print the table of results. config: with its overrides, as they are typed."""
    if not evaluations:
        raise ConfigError("nothing is evaluated", "name benchmarks in eval.benchmarks")
    if not any(current_artifact(store, step) for step in evaluations):
        first = state(store, evaluations[0])
        if first.state == "damaged":
            require_current(store, evaluations[0])
        raise MissingInputError(
            f"no evaluation is current: {evaluations[0].name} is {first.state} ({first.why})",
            f"lorapar run {config}",
        )
    terminal.results(store, evaluations, by or "system", as_json)
    absent = [step.name for step in evaluations if not current_artifact(store, step)]
    if absent:
        terminal.say(f"not shown, as not current: {', '.join(absent)}; lorapar status {config} says why")
    if not as_json:
        terminal.say(f"a page on this run: lorapar report {config} --out report")
