"""`lorapar export`: writes a trained adapter, both modes, or the merged model, to a folder."""

from pathlib import Path
from typing import Annotated, Literal

from lorapar_cli import terminal
from lorapar_cli.options import ConfigPath, Overrides, argument, flag, plan_of, trained, value
from stages.config import MODES, TRAINED
from stages.errors import ConfigError
from stages.pipeline.state import current_artifact

Folder = Annotated[Path, argument("Output folder; must not exist.", "DIR")]
Target = Annotated[str | None, value("sft or rl; if left out, the last that is evaluated.")]
Merged = Annotated[bool, flag("--merged", "Merge the adapter into the base model.")]
Views = Annotated[bool, flag("--views", "Write two adapters that are served together: fast/ and slow/.")]
Push = Annotated[str | None, value("Upload it to this repository of the hub, too.", "OWNER/NAME")]


def command(
    config: ConfigPath,
    folder: Folder,
    target: Target = None,
    merged: Merged = False,
    views: Views = False,
    push: Push = None,
    set_: Overrides = None,
) -> None:
    from stages import export as exporting

    exporting.refuse_existing(folder)  # at once: planning takes seconds
    settings, steps, store = plan_of(config, set_)
    if views and (target is not None or merged):
        raise ConfigError("--views exports both modes as adapters: leave out --target and --merged")
    evaluated = [name for name in TRAINED if name in settings.eval.targets]
    target = target or (evaluated or TRAINED)[-1]
    if target not in TRAINED:
        raise ConfigError(
            f"--target {target}: expected one of {', '.join(TRAINED)}", "fast is sft, slow is rl"
        )
    artifacts = trained(store, steps, list(MODES.values()) if views else [target])
    prefixes = tuple(f"eval:{name}@" for name in artifacts)
    evaluations = [current_artifact(store, step) for name, step in steps.items() if name.startswith(prefixes)]
    form: Literal["merged", "adapter"] = "merged" if merged else "adapter"
    exporting.write(artifacts, settings, folder, form, [each for each in evaluations if each])
    if views:
        names = ", ".join(f"{mode} ({name})" for mode, name in MODES.items())
        terminal.say(f"{folder}: {names}; the command that serves both is in {folder / 'README.md'}")
    else:
        terminal.say(f"{folder}: {form} of {target} {artifacts[target].manifest['key']}")
    if push:
        terminal.say(f"pushed to {exporting.push(folder, push)}")
