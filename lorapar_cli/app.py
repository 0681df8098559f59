"""The `lorapar` command: one command per row of the stage table, and what people need around them."""

import importlib
import logging
import os
import signal
import sys
from io import TextIOWrapper
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer

from lorapar_cli import terminal
from lorapar_cli.errors import to_user_error
from lorapar_cli.harness import entries
from lorapar_cli.options import ConfigPath, Force, Json, Only, Overrides, Unsafe, plan_of, sets, typed
from lorapar_cli.stage_starter import starter
from stages.config import Config
from stages.data.rows import no_path
from stages.engines import EngineCache
from stages.errors import ConfigError, Ended, panicked
from stages.pipeline import launch
from stages.pipeline.context import StageContext
from stages.pipeline.run import Task, Verb, check_enough_system2_rows, pending_stages, run_step
from stages.pipeline.stages import STAGES, Stage, order
from stages.pipeline.state import state
from stages.pipeline.steps import Step, ancestors
from stages.runtime import distributed, libraries, process_guard, resources
from stages.runtime.fork_server import Starter
from stages.store.artifacts import Store
from stages.sweep.graph import PLANNED

app = typer.Typer(
    help="LoRA-PAR: split LoRA elements and data into System 1 and System 2, train each apart.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
CHATTY = ("bitsandbytes", "vllm.triton_utils", "transformers.trainer_utils")
"""Loggers that tell at each start what nobody can act on, such as that a CPU has no Triton."""


def _unsafe(unsafe: bool, *stages: str) -> list[str]:
    return [f"{stage}.sandbox.backend=unsafe-no-sandbox" for stage in stages if unsafe]


def _make(settings: Config, steps: list[Step], force: bool, as_json: bool) -> None:
    """Make the artifacts of these steps, one after the other, with one engine as long as it serves."""
    planned = os.environ.get(PLANNED)
    if planned and planned not in {step.key for step in steps}:
        raise ConfigError(
            f"{steps[0].name} is no longer what was planned: its config has changed since",
            "call the sweep again",
        )
    progress = terminal.TerminalProgress() if distributed.is_main() else terminal.Silence()
    with EngineCache() as engines:
        for step in steps:
            artifact, made = run_step(settings, step, verb(step.stage.name), force, progress, engines)
            progress.done()
            if distributed.is_main():
                terminal.artifact(step.name, artifact, made, as_json)


def verb(name: str) -> Verb:
    """The function of a stage; its module, and with it torch, is loaded when it is called."""

    def run(job: StageContext, **sections: Any) -> dict[str, Any]:
        with libraries.hidden(*libraries.UNUSED):
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
        as_json: Json = False,
    ) -> None:
        settings, steps = plan_of(config, set_)
        mine = [s for s in steps.values() if s.stage is stage]
        if stage not in order(settings):
            raise ConfigError(f"a baseline has no stage {stage.name}", "go on with: lorapar sft CONFIG")
        if not mine:
            raise no_path()
        mine = _chosen(mine, only)
        launching = getattr(getattr(settings, stage.name), "launch", None)
        if (
            launching
            and launching.several
            and not distributed.launched()
            and (force or not _all_current(settings, mine))
        ):
            launch.run(launching, sys.argv[1:])
        else:
            _make(settings, mine, force, as_json)

    app.command(stage.name, help=stage.help)(command)


def _chosen(steps: list[Step], only: list[str] | None) -> list[Step]:
    """Those of the variants named by --only; all without one."""
    variants = [step.title for step in steps]
    if unknown := set(only or ()) - set(variants):
        raise ConfigError(
            f"--only {sorted(unknown)[0]}: there is no such variant", f"choose from: {', '.join(variants)}"
        )
    return [step for step in steps if not only or step.title in only]


for _stage in STAGES.values():
    if _stage.name != "eval":
        _stage_command(_stage)


@app.command("eval", help=STAGES["eval"].help)
def eval_(
    config: ConfigPath,
    set_: Overrides = None,
    only: Annotated[list[str] | None, typer.Option("--benchmark", help="Only this one; repeatable.")] = None,
    harness: Annotated[
        str | None, typer.Option(help="lm-eval: run tasks of lm-evaluation-harness instead.")
    ] = None,
    tasks: Annotated[str | None, typer.Option(help="Tasks of --harness, separated by commas.")] = None,
    task_files: Annotated[Path | None, typer.Option(help="Folder with task files of your own.")] = None,
    limit: Annotated[int | None, typer.Option(help="First N items of each of these tasks.", min=1)] = None,
    unsafe: Unsafe = False,
    force: Force = False,
    as_json: Json = False,
) -> None:
    overrides = [*(set_ or []), *_unsafe(unsafe, "eval")]
    if harness is not None:
        if harness != "lm-eval" or not tasks:
            raise ConfigError(f"--harness {harness}: expected --harness lm-eval --tasks NAME,…")
        if only:
            raise ConfigError("--benchmark and --harness exclude each other")
        found = entries(tasks, task_files, limit)
        overrides += found.values()
        only = list(found)
    elif tasks or task_files or limit:
        raise ConfigError("--tasks, --task-files and --limit go with --harness lm-eval")
    settings, steps = plan_of(config, overrides)
    wanted = only or list(settings.eval.benchmarks)
    if unknown := set(wanted) - set(settings.eval.benchmarks):
        raise ConfigError(
            f"no benchmark {sorted(unknown)[0]}", f"choose from: {', '.join(settings.eval.benchmarks)}"
        )
    mine = [s for s in steps.values() if s.stage.name == "eval" and s.variant.partition("@")[2] in wanted]
    if not mine:
        raise ConfigError(
            "nothing to evaluate",
            "name benchmarks in eval.benchmarks; without data.path, eval.targets=[base]",
        )
    _make(settings, mine, force, as_json)
    if not as_json:
        terminal.results(Store(settings.root), mine)


@app.command()
def run(
    config: ConfigPath,
    set_: Overrides = None,
    first: Annotated[str | None, typer.Option("--from", help="First stage; it is built again.")] = None,
    last: Annotated[str | None, typer.Option("--to", help="Last stage.")] = None,
    unsafe: Unsafe = False,
) -> None:
    """Run what is missing or stale, each stage in a process of its own."""
    set_ = [*(set_ or []), *_unsafe(unsafe, "rl", "eval")]
    settings, steps = plan_of(config, set_)
    ran = shown = False
    asked = ancestors(steps, last)
    with starter() as stages:
        for task in pending_stages(settings, steps, first, last):
            shown = task.stage == "eval" and not task.current
            if task.current:
                terminal.say(f"{task.stage}: {task.why} is current")
                continue
            if task.stage in ("score", "sft"):
                check_enough_system2_rows(settings, asked)
            ran = True
            terminal.say(f"--- {task.stage}: {task.why}")
            _wait_for(stages, [task.stage, str(config), *_options(set_, task)])
    if not ran:
        terminal.nothing_to_do()
    store = Store(settings.root)
    if not shown:  # the command shows them itself where it runs
        terminal.results(store, [s for s in asked.values() if s.stage.name == "eval"])
    terminal.places(store, asked)
    if last is None:
        again = typed(config, set_)
        terminal.say(
            f"next: lorapar report {again} --out report, or lorapar export {again} DIR (--views: both modes)"
        )


def _options(overrides: list[str], task: Task) -> list[str]:
    only = [part for variant in task.variants for part in ("--only", variant)]
    return [*sets(overrides), *only, *(["--force"] if task.force else [])]


def _wait_for(stages: Starter, arguments: list[str]) -> None:
    """A stage in a process of its own; its failure ends this one."""
    code = process_guard.finish(stages.start(arguments))
    if code > 128:
        reason = ", probably out of memory" if code == 128 + signal.SIGKILL else ""
        terminal.say(f"{arguments[0]} was ended by signal {code - 128}{reason}")
    if code:
        raise typer.Exit(code)


COMMANDS = (
    "init", "sweep", "report", "plan", "status", "show", "export", "list", "config", "doctor", "demo-data",
    "fetch",
)  # fmt: skip
"""Each has a file of its name, whose function `command` it is."""
for _name in COMMANDS:
    app.command(_name)(importlib.import_module(f"lorapar_cli.{_name.replace('-', '_')}").command)


def _end(number: int, _: FrameType | None) -> None:
    """Unwind, so that servers are stopped and temporary files go, as they do when a person interrupts."""
    for another in (signal.SIGTERM, signal.SIGHUP):  # guards send one more: it would interrupt the unwinding
        signal.signal(another, signal.SIG_IGN)
    raise Ended(128 + number)


def main() -> None:
    """Run the command; an error becomes two lines and its exit code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal may lack a letter
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.raiseExceptions = False  # stderr on a full disk is no reason for a traceback
    logging.getLogger("stages").setLevel(logging.INFO if distributed.is_main() else logging.ERROR)
    for chatty in CHATTY:
        logging.getLogger(chatty).setLevel(logging.ERROR)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    resources.let_waiting_threads_sleep()
    if not sys.stderr.isatty():  # in a log each step of a progress bar is a line
        os.environ.setdefault("TQDM_DISABLE", "1")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    # Processes that we start do not import a person's `datasets.py` from the folder that they stand in.
    os.environ.setdefault("PYTHONSAFEPATH", "1")
    if distributed.launched():  # a launcher ends its processes itself, unless it is killed
        process_guard.end_with_parent()
    else:
        for number in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is signal.SIG_DFL:  # nohup ignores one of them
                signal.signal(number, _end)
    try:
        app()
    except BaseException as problem:
        if os.environ.get("LORAPAR_DEBUG") or not (isinstance(problem, Exception) or panicked(problem)):
            raise
        error = to_user_error(problem)
        if not distributed.report_failure(error):
            terminal.error(error)
        sys.exit(error.exit_code)
    finally:  # nothing is left to unwind, and raised while Python exits these would print a traceback
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
            if signal.getsignal(number) in (_end, signal.default_int_handler):
                signal.signal(number, signal.SIG_DFL)
