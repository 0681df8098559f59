"""`lorapar demo-data`: writes the demonstration data set."""

from pathlib import Path
from typing import Annotated

from lorapar_cli import terminal
from lorapar_cli.options import argument, value
from stages.config.fields import MAX_INT
from stages.store.artifacts import refuse_store

Folder = Annotated[Path, argument("Folder for train.jsonl and test.jsonl.", "DIR")]
Seed = Annotated[int, value("Random seed; the same seed gives the same files.", min=0, max=MAX_INT)]


def command(folder: Folder, seed: Seed = 0) -> None:
    from stages.data.demo import write

    refuse_store(folder)
    sizes = write(folder, seed)
    terminal.say(", ".join(f"{folder}/{split}.jsonl: {n} items" for split, n in sizes.items()))
