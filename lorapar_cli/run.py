"""`lorapar run`: makes whatever is missing or stale, stage by stage, in this process."""

from lorapar_cli import options, terminal
from lorapar_cli.options import ConfigPath, LastStage, Overrides, Quiet, Unsafe, plan_of, sets
from lorapar_cli.plan import checked_texts
from lorapar_cli.stage import make, make_elsewhere, processes
from stages.pipeline.run import pending_stages
from stages.pipeline.state import current_artifact
from stages.pipeline.steps import ancestors


def command(
    config: ConfigPath, set_: Overrides = None, last: LastStage = None, unsafe: Unsafe = False,
    quiet: Quiet = False,
) -> None:  # fmt: skip
    set_ = options.with_unsafe(set_, unsafe)
    settings, steps, store = plan_of(config, set_)
    requested = ancestors(steps, last)
    made: set[str] = set()
    must_check, texts = True, None
    for task in pending_stages(steps, store, last):
        if task.current:
            terminal.say(f"{task.stage.name}: {task.why} is current")
            continue
        if must_check:
            pending = [step for step in requested.values() if not current_artifact(store, step)]
            texts = checked_texts(settings, store, pending, texts)
        must_check = task.stage.name == "classify"  # its labels tell more
        made.add(task.stage.name)
        terminal.say(f"--- {task.position}, {task.stage.name}: {task.why}")
        if number := processes(settings, task.steps[0]):
            only = [argument for step in task.steps for argument in ("--only", step.title)]
            flags = ["--quiet"] if quiet else []
            make_elsewhere([task.stage.name, str(config), *sets(set_), *only, *flags], number)
            store.look_again()
            continue
        with terminal.TerminalProgress(task.position) as progress:
            for result in make(settings, store, task.steps, False, progress):
                if not quiet:
                    terminal.artifact(*result)
        if task.stage.name == "eval":
            terminal.results(store, task.steps)
    if not made:
        terminal.say(terminal.NOTHING_TO_DO)
    if "eval" not in made:
        terminal.results(store, [s for s in requested.values() if s.stage.name == "eval"])
    if last is None:
        terminal.say(f"next: lorapar report {options.typed_config} --out report")
