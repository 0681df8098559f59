"""`lorapar export`: writes a trained adapter, both modes, or the merged model, to a folder."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from lorapar_cli import terminal
from lorapar_cli.options import ConfigPath, Overrides, flag, plan_of
from stages.config import TRAINED
from stages.data.rows import missing_path_error
from stages.errors import ConfigError
from stages.pipeline.state import current_artifact, require_current
from stages.store.artifacts import Store

Views = Annotated[
    bool,
    flag(
        "--views",
        help="Write two adapters that are served together: fast/ (SFT), slow/ (RL, or SFT's second round).",
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
    push: Annotated[
        str | None, typer.Option(metavar="OWNER/NAME", help="Upload it to this repository of the hub, too.")
    ] = None,
    set_: Overrides = None,
) -> None:
    from stages import export as exporting

    exporting.refuse_existing(folder)  # at once: planning takes seconds
    settings, steps = plan_of(config, set_)
    modes = settings.eval.modes
    if views and (target is not None or merged):
        raise ConfigError("--views exports both modes as adapters: leave out --target and --merged")
    target = target or modes["slow"]
    if target not in TRAINED:
        raise ConfigError(
            f"--target {target}: expected one of {', '.join(TRAINED)}", "fast is sft, slow is rl"
        )
    if target == "sft2" and settings.sft.rounds == 1:
        raise ConfigError("--target sft2: SFT has one round", "--set sft.rounds=2")
    targets = list(modes.values()) if views else [target]
    if not {TRAINED[name] for name in targets} <= set(steps):
        raise missing_path_error()
    store = Store(settings.root)
    trained = {name: require_current(store, steps[TRAINED[name]]) for name in targets}
    prefixes = tuple(f"eval:{name}@" for name in targets)
    evaluations = (current_artifact(store, step) for name, step in steps.items() if name.startswith(prefixes))
    evaluated = list(filter(None, evaluations))
    form: Literal["merged", "adapter"] = "merged" if merged else "adapter"
    exporting.write(trained, settings, folder, form, evaluated)
    if views:
        names = ", ".join(f"{mode} ({name})" for mode, name in modes.items())
        terminal.say(f"{folder}: {names}; the command that serves both is in {folder / 'README.md'}")
    else:
        terminal.say(f"{folder}: {form} of {target} {trained[target].manifest['key']}")
    if push:
        terminal.say(f"pushed to {exporting.push(folder, push)}")
