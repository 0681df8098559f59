"""`lorapar export`: writes a trained adapter, or the merged model, to a folder."""

from pathlib import Path
from typing import Annotated, Literal

from lorapar_cli import terminal
from lorapar_cli.options import ConfigPath, Overrides, argument, flag, plan_of, trained, value
from stages.pipeline.state import current_artifact

PUSH = "Upload it to this repository of the hub, too."


def command(
    config: ConfigPath,
    folder: Annotated[Path, argument("Output folder; must not exist.", "DIR")],
    target: Annotated[str | None, value("sft or rl; if left out, the last that is evaluated.")] = None,
    merged: Annotated[bool, flag("--merged", "Merge the adapter into the base model.")] = False,
    push: Annotated[str | None, value(PUSH, "OWNER/NAME")] = None,
    set_: Overrides = None,
) -> None:
    from stages import export as exporting

    exporting.refuse_existing(folder)  # at once: planning takes seconds
    settings, steps, store = plan_of(config, set_)
    adapter = trained(settings, store, steps, target)
    name = adapter.manifest["stage"]
    evaluations = [
        step for step in steps.values() if name in step.inputs and "metrics.json" in step.stage.files
    ]
    evaluated = [artifact for step in evaluations if (artifact := current_artifact(store, step))]
    form: Literal["merged", "adapter"] = "merged" if merged else "adapter"
    exporting.write(adapter, settings, folder, form, evaluated)
    terminal.say(f"{folder}: {form} of {name} {adapter.manifest['key']}; use: {folder / 'README.md'}")
    if push:
        terminal.say(f"pushed to {exporting.push(folder, push)}")
