"""`lorapar run`: makes whatever is missing or stale, stage by stage, in this process."""

from typing import Annotated

from lorapar_cli import options, terminal
from lorapar_cli.options import (
    SANDBOXED,
    ConfigPath,
    LastStage,
    Overrides,
    Quiet,
    Unsafe,
    plan_of,
    sets,
    value,
    without_sandbox,
)
from lorapar_cli.plan import check_for_failures, texts_of
from lorapar_cli.progress import TerminalProgress
from lorapar_cli.stage import make, make_elsewhere, processes, report
from stages.pipeline.run import Task, pending_stages
from stages.pipeline.state import current_artifact
from stages.pipeline.steps import ancestors

FROM = "First stage, made again even if it is current. If a later one fails, go on without --from."


def command(
    config: ConfigPath,
    set_: Overrides = None,
    first: Annotated[str | None, value(FROM, "STAGE", "--from")] = None,
    last: LastStage = None,
    unsafe: Unsafe = False,
    quiet: Quiet = False,
) -> None:
    set_ = [*(set_ or []), *without_sandbox(unsafe, *SANDBOXED)]
    settings, steps, store = plan_of(config, set_)
    requested = ancestors(steps, last)
    made: set[str] = set()
    must_check, texts = True, None
    for task in pending_stages(steps, store, first, last):
        if task.current:
            terminal.say(f"{task.stage.name}: {task.why} is current")
            continue
        if must_check:
            forced = task.steps if task.force else []
            pending = [s for s in requested.values() if s in forced or not current_artifact(store, s)]
            texts = texts or texts_of(settings, store)
            check_for_failures(texts, pending, quietly=True)
        must_check = task.stage.name == "classify"  # its labels tell more
        made.add(task.stage.name)
        terminal.say(f"--- {task.position}, {task.stage.name}: {task.why}")
        if number := processes(settings, task.steps[0]):
            make_elsewhere([task.stage.name, str(config), *_options(set_, task, quiet)], number)
            store.look_again()
            continue
        with TerminalProgress(task.position) as progress:
            on_made = (lambda *_: None) if quiet else report
            make(settings, store, task.steps, task.force, progress, on_made)
        if task.stage.name == "eval":
            terminal.results(store, task.steps)
    if not made:
        terminal.nothing_to_do()
    if "eval" not in made:
        terminal.results(store, [s for s in requested.values() if s.stage.name == "eval"])
    if last is None:
        terminal.say(f"next: lorapar report {options.typed_config} --out report")


def _options(overrides: list[str], task: Task, quiet: bool) -> list[str]:
    only = [argument for step in task.steps for argument in ("--only", step.title)]
    flags = [flag for flag, is_set in (("--force", task.force), ("--quiet", quiet)) if is_set]
    return [*sets(overrides), *only, *flags]
