"""`lorapar STAGE`: makes the artifacts of one stage. `run` and `sweep` make their steps in the same way."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial

from lorapar_cli import terminal
from lorapar_cli.options import ConfigPath, Force, Json, Only, Overrides, Quiet, plan_of
from lorapar_cli.progress import TerminalProgress
from stages.config import Config
from stages.data.rows import missing_path_error
from stages.engines import EngineCache
from stages.errors import ConfigError
from stages.pipeline.run import calls_of_pending, give_memory_back, run_step
from stages.pipeline.stage import Stage
from stages.pipeline.state import current_artifact
from stages.pipeline.steps import Step
from stages.runtime import libraries, process_guard, ranks
from stages.store.artifacts import Artifact, Store

OnMade = Callable[[Step, Artifact, bool], None]
"""Called after each step, with its artifact and whether it was made now."""


def make(
    settings: Config,
    store: Store,
    steps: list[Step],
    force: bool,
    progress: TerminalProgress,
    on_made: OnMade,
) -> None:
    """Make steps of one stage in turn. An engine is kept for the next step as long as it fits."""
    with EngineCache() as engines:
        if not force:
            _answer_together(settings, store, steps, progress, engines)
        for step in steps:
            artifact, created = run_step(settings, store, step, force, progress, engines)
            progress.done()
            on_made(step, artifact, created)
    give_memory_back()


def _answer_together(
    settings: Config, store: Store, steps: list[Step], progress: TerminalProgress, engines: EngineCache
) -> None:
    """Let targets that one server can serve be answered by one, if there are several."""
    sharing = [step for step in steps if step.planned.answers_together]
    calls = list(calls_of_pending(settings, store, sharing, progress, engines))
    if len(calls) > 1:
        with libraries.hide_packages(*libraries.UNUSED):
            answer_together = steps[0].stage.function("answer_together")
        answer_together(calls)


def command_of(stage: Stage) -> Callable[..., None]:
    """The command of a stage that has none of its own."""

    def command(
        config: ConfigPath,
        set_: Overrides = None,
        only: Only = None,
        force: Force = False,
        quiet: Quiet = False,
        as_json: Json = False,
    ) -> None:
        settings, steps, store = plan_of(config, set_)
        selected = [s for s in steps.values() if s.stage is stage]
        if not selected and settings.data.path and settings.baseline:
            raise ConfigError(f"a baseline has no stage {stage.name}", "lorapar sft CONFIG")
        if not selected:
            raise missing_path_error()
        make_alone(settings, store, _variants(selected, only), force, as_json)

    return command


def make_alone(settings: Config, store: Store, steps: list[Step], force: bool, as_json: bool) -> None:
    """Make steps of one stage for its command."""
    number = processes(settings, steps[0])
    if number > 1 and (force or not all(current_artifact(store, step) for step in steps)):
        return make_elsewhere(sys.argv[1:], number)
    if not ranks.is_main():
        terminal.set_quiet(True)
    with TerminalProgress() as progress:
        make(settings, store, steps, force, progress, partial(report, as_json=as_json))


def processes(settings: Config, step: Step) -> int:
    """The number of processes to start for a step; 0 if this one makes it.

    ConfigError if a launcher has started several processes of a stage that is for one.
    """
    trains = "adapter/" in step.stage.files
    if ranks.world_size() > 1 and not trains:
        raise ConfigError(
            f"{step.stage.name} was started in {ranks.world_size()} processes, and is for one",
            "start it without torchrun",
        )
    if trains and settings.launch.processes > 1:
        return 0 if ranks.launched() else settings.launch.processes
    return int(step.planned.own_process)


def make_elsewhere(arguments: list[str], number: int) -> None:
    """Run `lorapar ARGUMENTS` in processes of their own, whose messages stand here too."""
    command = [sys.executable, "-m", "lorapar_cli", *arguments]
    if code := ranks.run(command, number) if number > 1 else process_guard.run(command):
        raise SystemExit(code)


def report(step: Step, artifact: Artifact, created: bool, as_json: bool = False) -> None:
    if ranks.is_main():
        terminal.artifact(step.name, artifact, created, as_json)


def _variants(steps: list[Step], only: list[str] | None) -> list[Step]:
    """Select the steps whose variants are named by --only; all without it."""
    variants = [step.title for step in steps]
    if unknown := set(only or ()) - set(variants):
        raise ConfigError(
            f"--only {sorted(unknown)[0]}: no such variant", f"choose from: {', '.join(variants)}"
        )
    return [step for step in steps if not only or step.title in only]
