"""`lorapar show`: a manifest, graded samples, or the table of results."""

from typing import Annotated

from lorapar_cli import options, terminal
from lorapar_cli.options import ConfigPath, Overrides, argument, flag, plan_of, value
from stages.errors import ConfigError
from stages.pipeline.state import current_artifact, require_current, state
from stages.pipeline.steps import Step
from stages.store.artifacts import Store

STAGE = "A stage, eval:TARGET or eval:TARGET@BENCHMARK; none: the results."
SAMPLES = "Show graded answers of an evaluation (eval:TARGET)."
BY = "Split results by this field of the test rows; system if left out."


def command(
    config: ConfigPath,
    stage: Annotated[str | None, argument(STAGE)] = None,
    set_: Overrides = None,
    samples: Annotated[bool, flag("--samples", SAMPLES)] = False,
    wrong: Annotated[bool, flag("--wrong", "Show only answers that are not correct.")] = False,
    by: Annotated[str | None, value(BY)] = None,
    limit: Annotated[int | None, value("How many answers; 5 if left out.", min=1)] = None,
) -> None:
    _, steps, store = plan_of(config, set_)
    evaluations = [step for step in steps.values() if step.stage.name == "eval"]
    samples |= wrong or limit is not None
    if samples and (stage is None or not stage.startswith("eval")):
        names = ", ".join(step.name for step in evaluations)
        raise ConfigError("--samples, --wrong and --limit go with an evaluation", f"choose from: {names}")
    if stage is None:
        _show_results(store, evaluations, by)
        return
    if by is not None:
        hint = f"lorapar show {options.typed_config} --by {by}"
        raise ConfigError("--by goes with the results of all evaluations", hint)
    named = [s for name, s in steps.items() if name == stage or name.startswith((f"{stage}@", f"{stage}:"))]
    if not named:
        raise ConfigError(f"no stage {stage!r}", f"choose from: {', '.join(steps)}")
    for step in named:
        now = state(store, step)
        artifact = now.artifact if now.state == "stale" and now.artifact else require_current(store, step)
        if now.state == "stale":
            terminal.say(f"{step.name} is stale: {now.why}")
        if samples:
            terminal.samples(artifact, wrong, limit or 5)
        else:
            terminal.manifest(artifact)


def _show_results(store: Store, evaluations: list[Step], by: str | None) -> None:
    if not evaluations:
        raise ConfigError("nothing is evaluated", "name benchmarks in eval.benchmarks")
    absent = [step for step in evaluations if not current_artifact(store, step)]
    if len(absent) == len(evaluations):
        require_current(store, absent[0])
    terminal.results(store, evaluations, by or "system")
    if absent:
        names = ", ".join(step.name for step in absent)
        terminal.say(f"not shown, as not current: {names}; lorapar status {options.typed_config} says why")
