"""`lorapar STAGE`: makes the artifacts of one stage.

`run` and workers of `sweep` make their steps in the same way.
"""

import gc
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from lorapar_cli import options, terminal
from lorapar_cli.errors import report_failure
from lorapar_cli.options import ConfigPath, Force, Only, Overrides, Quiet, Unsafe, plan_of
from lorapar_cli.process import set_up
from stages.config import Config
from stages.data.rows import missing_path_error
from stages.engines import EngineCache
from stages.errors import ConfigError
from stages.pipeline.run import calls_of_pending, run_step
from stages.pipeline.stage import Stage
from stages.pipeline.state import current_artifact
from stages.pipeline.steps import Step
from stages.runtime import gpu, libraries, process_guard, ranks, resources
from stages.store.artifacts import Artifact, Store


def make(
    settings: Config, store: Store, steps: list[Step], force: bool, progress: terminal.TerminalProgress
) -> Iterator[tuple[Step, Artifact, bool]]:
    """Make steps of one stage in turn; yield each with its artifact, and whether it was made now.

    An engine is kept for the next step as long as it fits.
    """
    with EngineCache() as engines:
        if not force:  # targets that one server can serve are answered by one, if there are several
            sharing = [step for step in steps if step.planned.answers_together]
            calls = list(calls_of_pending(settings, store, sharing, progress, engines))
            if len(calls) > 1:
                with libraries.hide_packages(*libraries.UNUSED):
                    answer_together = steps[0].stage.function("answer_together")
                answer_together(calls)
        for step in steps:
            artifact, created = run_step(settings, store, step, force, progress, engines)
            progress.done()
            yield step, artifact, created
    gc.collect()  # models are in reference cycles
    resources.release_memory()


def command_of(stage: Stage) -> Callable[..., None]:
    """The command that makes the artifacts of one stage."""

    def command(
        config: ConfigPath, set_: Overrides = None, only: Only = None, unsafe: Unsafe = False,
        force: Force = False, quiet: Quiet = False,
    ) -> None:  # fmt: skip
        settings, steps, store = plan_of(config, options.with_unsafe(set_, unsafe))
        variants = {s.title: s for s in steps.values() if s.stage is stage}
        if not variants and stage.name == "eval":
            hint = "set eval.benchmarks; without data.path, also eval.targets=[base]"
            raise ConfigError("nothing to evaluate", hint)
        if not variants and settings.data.path and settings.baseline:
            raise ConfigError(f"a baseline has no stage {stage.name}", "lorapar sft CONFIG")
        if not variants:
            raise missing_path_error()
        if unknown := set(only or ()) - set(variants):
            hint = f"choose from: {', '.join(variants)}"
            raise ConfigError(f"--only {min(unknown)}: no such variant", hint)
        selected = [step for title, step in variants.items() if not only or title in only]
        number = processes(settings, selected[0])
        if number > 1 and (force or not all(current_artifact(store, step) for step in selected)):
            return make_elsewhere(sys.argv[1:], number)
        if not ranks.is_main():
            terminal.set_quiet(True)
        with ranks.together(), terminal.TerminalProgress() as progress:
            for result in make(settings, store, selected, force, progress):
                if ranks.is_main():
                    terminal.artifact(*result)
        if stage.name == "eval":
            terminal.results(store, selected)

    return command


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


def begin_worker(device: str | None) -> None:
    """Set up a process of `sweep` that makes one step after the other.

    device: the GPUs that it may use; None leaves them as they are.
    """
    process_guard.end_with_parent()
    os.setsid()  # an interrupt at the terminal reaches the sweep, which ends its workers
    if device is not None:
        os.environ[gpu.VISIBLE] = device
    set_up()


def make_step(config: Config, step: Step, command: list[str], log: Path) -> int:
    """Make one step, and return the exit code that its command would have.

    command: the arguments of `lorapar` that make it, for steps that need processes of their own. log: the
    file that gets all output.
    """
    with log.open("ab") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    options.typed_config = " ".join(command[1:])
    sys.argv[1:] = command  # what the manifest says
    try:
        if number := processes(config, step):
            make_elsewhere(command, number)
        else:
            with terminal.TerminalProgress() as progress:
                for result in make(config, Store(config.root), [step], False, progress):
                    terminal.artifact(*result)
    except Exception as problem:
        return report_failure(problem)
    finally:
        sys.stdout.flush()
    return 0
