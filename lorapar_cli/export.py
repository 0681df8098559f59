"""`lorapar export`: writes a trained adapter, or the merged model, to a folder."""

import importlib.util
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from lorapar_cli import terminal
from lorapar_cli.options import ConfigPath, Overrides, flag, plan_of
from stages.config import TRAINED
from stages.data.rows import missing_path_error
from stages.errors import ConfigError
from stages.pipeline.state import current_artifact, require_current
from stages.store.artifacts import Store

MAX_CHECKS = 10_000
Views = Annotated[
    bool,
    flag(
        "--views",
        help="Write two adapters that are served together: fast/ (SFT), slow/ (RL, or SFT's second round).",
    ),
]
Check = Annotated[
    int,
    typer.Option(
        "--check",
        metavar="N",
        min=0,
        max=MAX_CHECKS,
        help="Compare N greedy answers of the export with the trained adapter's, on every installed "
        "engine; for --views, on one vLLM server.",
    ),
]
Gguf = Annotated[
    Path | None,
    typer.Option(
        "--gguf",
        metavar="LLAMA_CPP",
        help="Also write GGUF files for llama.cpp and Ollama, by the converters in this clone of llama.cpp.",
    ),
]
Push = Annotated[
    str | None,
    typer.Option(
        "--push",
        metavar="NAME",
        help="Upload the folder to this repository on the hub; a new one is private.",
    ),
]


def command(
    config: ConfigPath,
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Output folder; must not exist.")],
    target: Annotated[
        str | None,
        typer.Option(help="Which adapter to export: sft, sft2 or rl; if left out, that of the slow mode."),
    ] = None,
    merged: Annotated[bool, flag("--merged", help="Merge the adapter into the base model.")] = False,
    views: Views = False,
    base_dtype: Annotated[
        bool, flag("--base-dtype", help="Cast the adapter to the data type of the base model.")
    ] = False,
    llama_cpp: Gguf = None,
    prompts: Check = 0,
    repository: Push = None,
    set_: Overrides = None,
) -> None:
    from stages import export as exporting
    from stages import gguf

    exporting.refuse_existing(folder)  # at once: planning takes seconds
    settings, steps = plan_of(config, set_)
    modes = settings.eval.modes
    if views and target is not None:
        raise ConfigError("--views exports both modes: leave out --target")
    target = target or modes["slow"]
    _check_options(target, merged, base_dtype, views)
    if target == "sft2" and settings.sft.rounds == 1:
        raise ConfigError("--target sft2: SFT has one round", "--set sft.rounds=2")
    if llama_cpp:
        gguf.check(llama_cpp)
    targets = list(modes.values()) if views else [target]
    if not {TRAINED[name] for name in targets} <= set(steps):
        raise missing_path_error()
    store = Store(settings.root)
    trained = {name: require_current(store, steps[TRAINED[name]]) for name in targets}
    prefixes = tuple(f"eval:{name}@" for name in targets)
    evaluations = (current_artifact(store, step) for name, step in steps.items() if name.startswith(prefixes))
    evaluated = list(filter(None, evaluations))
    if views:
        if prompts and not importlib.util.find_spec("vllm"):
            raise ConfigError("--views --check needs vLLM, which is not installed", "leave out --check")
        exporting.write_views(trained, settings, folder, base_dtype, evaluated, llama_cpp)
        names = ", ".join(f"{mode} ({name})" for mode, name in modes.items())
        terminal.say(f"{folder}: {names}; the command that serves both is in {folder / 'README.md'}")
        check = exporting.check_views(trained, settings, folder, prompts, terminal.say)
    else:
        form: Literal["merged", "adapter"] = "merged" if merged else "adapter"
        exporting.write(trained[target], settings, folder, form, base_dtype, evaluated, llama_cpp)
        terminal.say(f"{folder}: {form} of {target} {trained[target].manifest['key']}")
        check = exporting.check(trained[target], settings, folder, form, prompts, terminal.say)
    for row in check if prompts else ():  # a generator: it begins only here
        _print_check(row)
    if repository is not None:
        terminal.say(f"pushed to {exporting.push(folder, repository)}")


def _check_options(target: str, merged: bool, base_dtype: bool, views: bool) -> None:
    if target not in TRAINED:
        names = ", ".join(TRAINED)
        raise ConfigError(f"--target {target}: expected one of {names}", "fast is sft, slow is rl or sft2")
    if merged and base_dtype:
        raise ConfigError("--base-dtype is for adapters: a merged model has the data type of its base")
    if merged and views:
        raise ConfigError("--views cannot be combined with --merged: a merged model has only one mode")


def _print_check(row: dict[str, Any]) -> None:
    agree = f"{row['agree']:.1%} of {row['tokens']} tokens are the adapter's own choice"
    gap = f"within {row['tolerance']} logits, largest gap {row['worst_gap']:.3f}"
    differ = f"{row['differ_from_base']} of {row['items']} answers differ from the base's"
    fast = f", {row['differ_from_fast']} from fast's" if "differ_from_fast" in row else ""
    terminal.say(f"  {row['engine']}: {agree} {gap}; {differ}{fast}")
