"""`lorapar demo-data`: writes the demonstration data set."""

from pathlib import Path
from typing import Annotated

import typer

from lorapar_cli import terminal
from stages.config.fields import MAX_INT
from stages.store.artifacts import refuse_store


def command(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder for train.jsonl and test.jsonl.")],
    seed: Annotated[
        int, typer.Option(help="Random seed; the same seed gives the same files.", min=0, max=MAX_INT)
    ] = 0,
) -> None:
    from stages.data.demo import write

    refuse_store(folder)
    sizes = write(folder, seed)
    terminal.say(", ".join(f"{folder}/{split}.jsonl: {n} items" for split, n in sizes.items()))
