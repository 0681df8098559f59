"""The `lorapar` command line: one command per stage, and the commands around them."""

import importlib
import logging
import os
import signal
import sys
from collections.abc import Collection
from io import TextIOWrapper
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer

from lorapar_cli import options, terminal
from lorapar_cli.commands import ABOUT, COMMANDS
from lorapar_cli.errors import to_user_error
from lorapar_cli.harness import entries
from lorapar_cli.options import (
    ConfigPath,
    Force,
    Json,
    LastStage,
    Only,
    Overrides,
    Quiet,
    Unsafe,
    plan_of,
    sets,
    typed,
)
from lorapar_cli.progress import Position, Silence, TerminalProgress
from lorapar_cli.stage_starter import starter
from stages.config import TRAINED, Config
from stages.data.rows import missing_path_error
from stages.engines import EngineCache
from stages.errors import ConfigError, LoraparError, Terminated, is_rust_panic
from stages.pipeline import launch
from stages.pipeline.context import StageContext
from stages.pipeline.run import Task, Verb, pending_stages, run_step, upcoming
from stages.pipeline.stages import STAGES, Stage, order
from stages.pipeline.state import state
from stages.pipeline.steps import Step, ancestors
from stages.runtime import distributed, libraries, process_guard, resources
from stages.store.artifacts import Store
from stages.sweep.graph import PLANNED

app = typer.Typer(
    help=ABOUT,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)
SILENCED_LOGGERS = ("bitsandbytes", "vllm.triton_utils", "transformers.trainer_utils")
"""Libraries whose warnings at startup are not actionable, such as that a CPU has no Triton."""


def _unsafe(unsafe: bool, *stages: str) -> list[str]:
    return [f"{stage}.sandbox.backend=unsafe-no-sandbox" for stage in stages if unsafe]


def _make(settings: Config, steps: list[Step], force: bool, quiet: bool, as_json: bool) -> None:
    """Run steps one after the other. An engine is kept for the next step as long as it fits."""
    planned = os.environ.get(PLANNED)
    if planned and planned not in {step.key for step in steps}:
        raise ConfigError(
            f"{steps[0].name} is no longer what was planned: its config or its data have changed since",
            "run the same command again, with the old config or with the new one",
        )
    position = Position.of_this_process()
    is_shown = distributed.is_main() and not quiet
    progress = TerminalProgress(position) if is_shown else Silence()
    with progress, EngineCache() as engines:
        if steps[0].stage.name == "eval" and settings.eval.engine == "vllm" and not force:
            _answer_ahead(settings, steps, progress, engines)
        for step in steps:
            progress.begin(step.name)
            artifact, created = run_step(settings, step, verb(step.stage.name), force, progress, engines)
            progress.done()
            if is_shown or (distributed.is_main() and position is None):  # a quiet run has results of its own
                terminal.artifact(step.name, artifact, created, as_json)


def _answer_ahead(
    settings: Config, steps: list[Step], progress: TerminalProgress | Silence, engines: EngineCache
) -> None:
    """Let targets that one server can serve be answered by one, if there are several."""
    with libraries.hide_packages(*libraries.UNUSED):
        from stages import eval as evaluation

        sharing = [step for step in steps if evaluation.may_share_server(settings, step.variant)]
        calls = upcoming(settings, sharing, progress, engines)
        if len(calls) > 1:
            evaluation.answer_ahead(calls)


def verb(name: str) -> Verb:
    """Return the function of a stage. Its module, and with it torch, is imported only when it is called."""

    def run(job: StageContext, **sections: Any) -> dict[str, Any]:
        with libraries.hide_packages(*libraries.UNUSED):
            stage = importlib.import_module(f"stages.{name}")
        return stage.run(job, **sections)  # type: ignore[no-any-return]

    return run


def _all_current(settings: Config, steps: list[Step]) -> bool:
    store = Store(settings.root)
    return all(state(store, step).state == "current" for step in steps)


def _stage_command(stage: Stage) -> None:
    def command(
        config: ConfigPath,
        set_: Overrides = None,
        only: Only = None,
        force: Force = False,
        quiet: Quiet = False,
        as_json: Json = False,
    ) -> None:
        settings, steps = plan_of(config, set_)
        selected = [s for s in steps.values() if s.stage is stage]
        if stage not in order(settings):
            raise ConfigError(f"a baseline has no stage {stage.name}", "lorapar sft CONFIG")
        if not selected:
            raise missing_path_error()
        selected = _variants(selected, only)
        launching = getattr(getattr(settings, stage.name), "launch", None)
        if (
            launching
            and launching.is_distributed
            and not distributed.launched()
            and (force or not _all_current(settings, selected))
        ):
            launch.run(launching, sys.argv[1:])
        else:
            _make(settings, selected, force, quiet, as_json)

    app.command(stage.name, help=COMMANDS[stage.name])(command)


def _variants(steps: list[Step], only: list[str] | None) -> list[Step]:
    """Select the steps whose variants are named by --only; all without it."""
    variants = [step.title for step in steps]
    if unknown := set(only or ()) - set(variants):
        raise ConfigError(
            f"--only {sorted(unknown)[0]}: no such variant", f"choose from: {', '.join(variants)}"
        )
    return [step for step in steps if not only or step.title in only]


for _stage in STAGES.values():
    if _stage.name != "eval":
        _stage_command(_stage)


@app.command("eval", help=COMMANDS["eval"])
def eval_(
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
    overrides = [*(set_ or []), *_unsafe(unsafe, "eval")]
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
    _make(settings, evaluations, force, quiet, as_json)
    if not as_json:
        terminal.results(Store(settings.root), evaluations)


@app.command(help=COMMANDS["run"])
def run(
    config: ConfigPath,
    set_: Overrides = None,
    first: Annotated[
        str | None,
        typer.Option(
            "--from",
            metavar="STAGE",
            help="First stage, made again even if it is current. If a later one fails, go on without --from.",
        ),
    ] = None,
    last: LastStage = None,
    unsafe: Unsafe = False,
    quiet: Quiet = False,
) -> None:
    set_ = [*(set_ or []), *_unsafe(unsafe, "rl", "eval")]
    settings, steps = plan_of(config, set_)
    any_ran, results_printed, must_check = False, False, True
    requested = ancestors(settings, steps, last)
    check = ["plan", str(config), "--check", *sets(set_), *(["--to", last] if last else [])]
    with starter() as stages:
        for task in pending_stages(settings, steps, first, last):
            results_printed = task.stage == "eval" and not task.current  # by the eval command
            if task.current:
                terminal.say(f"{task.stage}: {task.why} is current")
                continue
            if must_check:
                _run_stage(stages.start(check), "plan")
            must_check = task.stage == "classify"  # its labels tell more
            any_ran = True
            position = Position.of_task(task, Store(settings.root))
            terminal.say(f"--- {position.labels[0]}, {task.stage}: {task.why}")
            command = [task.stage, str(config), *_options(set_, task, quiet)]
            # The stage reads the config again, and somebody may have edited it for the next run.
            environment = position.environment() | {PLANNED: task.remaining[0].key}
            _run_stage(stages.start(command, environment), task.stage)
    if not any_ran:
        terminal.nothing_to_do()
    store = Store(settings.root)
    if not results_printed:
        terminal.results(store, [s for s in requested.values() if s.stage.name == "eval"])
    terminal.places(store, requested)
    if last is None:
        terminal.say(f"next: {_next(settings, requested, typed(config, set_))}")


def _next(settings: Config, requested: Collection[str], arguments: str) -> str:
    """The commands that use what a run has made. requested: the names of its steps."""
    report = f"lorapar report {arguments} --out report"
    trained = [target for target, step in TRAINED.items() if step in requested]
    if not trained:
        return report
    modes = settings.eval.modes.values()
    target = "" if settings.eval.modes["slow"] in trained else f" --target {trained[-1]}"
    views = " (--views: both modes)" if set(modes) <= set(trained) and settings.served_by_vllm else ""
    return f"{report}, or lorapar export {arguments} DIR{target}{views}"


def _options(overrides: list[str], task: Task, quiet: bool) -> list[str]:
    only = [argument for variant in task.variants for argument in ("--only", variant)]
    flags = [flag for flag, is_set in (("--force", task.force), ("--quiet", quiet)) if is_set]
    return [*sets(overrides), *only, *flags]


def _run_stage(child: process_guard.Child, stage: str) -> None:
    """Wait for a stage's process; if it fails, exit with its code."""
    code = process_guard.finish(child)
    if code > 128:
        reason = ", probably out of memory" if code == 128 + signal.SIGKILL else ""
        terminal.error(LoraparError(f"{stage} was killed by signal {code - 128}{reason}"))
    if code:
        raise typer.Exit(code)


for _name in COMMANDS:
    if _name not in STAGES and _name != "run":  # each has a module of its name, with a function `command`
        _module = importlib.import_module(f"lorapar_cli.{_name.replace('-', '_')}")
        app.command(_name, help=COMMANDS[_name])(_module.command)


def _end(number: int, _: FrameType | None) -> None:
    """Raise Terminated, so that `finally` blocks stop servers and delete temporary files, as on Ctrl-C."""
    for another in (signal.SIGTERM, signal.SIGHUP):  # guards send a second one, which would interrupt that
        signal.signal(another, signal.SIG_IGN)
    raise Terminated(128 + number)


def main() -> None:
    """Run the command; an error becomes an `error:` line, a `hint:` line and an exit code."""
    if sys.stderr is None:  # closed: else the next file would be opened as stderr
        sys.stderr = open(os.devnull, "w", encoding="utf-8")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # not every terminal has every character
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[terminal.LogHandler()])
    logging.raiseExceptions = False  # stderr on a full disk is no reason for a traceback
    logging.getLogger("stages").setLevel(logging.INFO if distributed.is_main() else logging.ERROR)
    for name in SILENCED_LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    logging.getLogger("huggingface_hub").propagate = False  # it prints its messages itself
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    resources.let_waiting_threads_sleep()
    resources.limit_threads()
    if not sys.stderr.isatty():  # each update of a progress bar would be a line of the log
        for name in terminal.NO_PROGRESS_BARS:
            os.environ.setdefault(name, "1")
    # Child processes must not import, for instance, a user's `datasets.py` from the current folder.
    os.environ.setdefault("PYTHONSAFEPATH", "1")
    if distributed.launched():  # a launcher ends its processes itself, except when it is killed
        process_guard.end_with_parent()
    else:
        for number in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is signal.SIG_DFL:  # nohup ignores SIGHUP: leave that
                signal.signal(number, _end)
    try:
        app()
    except BaseException as problem:
        if os.environ.get("LORAPAR_DEBUG") or not (isinstance(problem, Exception) or is_rust_panic(problem)):
            raise
        error = to_user_error(problem)
        if not distributed.report_failure(error):
            terminal.error(error, options.typed_config)
        sys.exit(error.exit_code)
    finally:  # nothing is left to unwind, and an exception while Python exits would print a traceback
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
            if signal.getsignal(number) in (_end, signal.default_int_handler):
                signal.signal(number, signal.SIG_DFL)
