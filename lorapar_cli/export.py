"""`lorapar export`: a trained adapter, or the merged model, as a folder of its own."""

import importlib.util
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

from lorapar_cli import terminal
from lorapar_cli.options import ConfigPath, Overrides, plan_of
from stages.data.rows import no_path
from stages.errors import ConfigError
from stages.pipeline.state import current, state
from stages.store.artifacts import Store


def command(
    config: ConfigPath,
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Where it goes; must not exist.")],
    target: Annotated[str, typer.Option(help="sft or rl.")] = "rl",
    merged: Annotated[bool, typer.Option("--merged", help="Merge the adapter into the base model.")] = False,
    views: Annotated[
        bool, typer.Option("--views", help="Write fast/ (SFT's adapter) and slow/ (RL's), served together.")
    ] = False,
    base_dtype: Annotated[
        bool, typer.Option("--base-dtype", help="Adapter weights in the type of the base model.")
    ] = False,
    prompts: Annotated[
        int,
        typer.Option(
            "--check",
            metavar="N",
            help="Compare N greedy answers of what was written with the trained adapter's; of views, both "
            "by one vLLM server.",
        ),
    ] = 0,
    repository: Annotated[
        str | None, typer.Option("--push", metavar="NAME", help="Then upload it: a private hub repository.")
    ] = None,
    set_: Overrides = None,
) -> None:
    """Write a trained adapter, or the merged model, with a model card; --check asks every engine."""
    from stages import export as exporting
    from stages.report.card import VIEWS, Form

    settings, steps = plan_of(config, set_)
    _refuse(target, merged, base_dtype, views)
    targets = [view.stage for view in VIEWS.values()] if views else [target]
    if not set(targets) <= set(steps):
        raise no_path()
    store = Store(settings.root)
    trained = {name: current(store, steps[name]) for name in targets}
    prefixes = tuple(f"eval:{name}@" for name in targets)
    stands = [state(store, step) for name, step in steps.items() if name.startswith(prefixes)]
    evaluated = [now.artifact for now in stands if now.state == "current" and now.artifact]
    rows: Iterable[dict[str, Any]]
    if views:
        if prompts and not importlib.util.find_spec("vllm"):
            raise ConfigError("--views --check needs vLLM, which is not installed", "leave out --check")
        exporting.write_views(trained, settings, folder, base_dtype, evaluated)
        both = ", ".join(f"{name} ({view.stage})" for name, view in VIEWS.items())
        terminal.say(f"{folder}: {both}; the command that serves both is in {folder / 'README.md'}")
        rows = exporting.check_views(trained, settings, folder, prompts, terminal.say) if prompts else ()
    else:
        form: Form = "merged" if merged else "adapter"
        exporting.write(trained[target], settings, folder, form, base_dtype, evaluated)
        terminal.say(f"{folder}: {form} of {target} {trained[target].manifest['key']}")
        check = exporting.check
        rows = check(trained[target], settings, folder, form, prompts, terminal.say) if prompts else ()
    _tell(rows)
    if repository is not None:
        terminal.say(f"pushed to {exporting.push(folder, repository)}")


def _refuse(target: str, merged: bool, base_dtype: bool, views: bool) -> None:
    if target not in ("sft", "rl"):
        raise ConfigError(f"--target {target}: expected sft or rl")
    if merged and base_dtype:
        raise ConfigError("--base-dtype is for adapters: a merged model has the type of its base")
    if merged and views:
        raise ConfigError("--views are adapters: a merged model has one mode")


def _tell(rows: Iterable[dict[str, Any]]) -> None:
    """What a check has found, a line for each engine or view."""
    for row in rows:
        agree = f"{row['agree']:.1%} of {row['tokens']} tokens are the adapter's own choice"
        gap = f"within {row['tolerance']} logits, largest gap {row['worst_gap']:.3f}"
        differ = f"{row['differ_from_base']} of {row['items']} answers differ from the base's"
        fast = f", {row['differ_from_fast']} from fast's" if "differ_from_fast" in row else ""
        terminal.say(f"  {row['engine']}: {agree} {gap}; {differ}{fast}")
