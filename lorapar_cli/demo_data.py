"""`lorapar demo-data`: write the demonstration set."""

from pathlib import Path
from typing import Annotated

import typer

from lorapar_cli import terminal


def command(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Where train.jsonl and test.jsonl go.")],
    seed: Annotated[int, typer.Option(help="The same seed gives the same bytes.")] = 0,
    long: Annotated[
        bool, typer.Option("--long", help="The larger set of demo-long.yaml, with valid and final.jsonl.")
    ] = False,
) -> None:
    """Write the demonstration set."""
    from stages.data.demo import write

    sizes = write(folder, seed, "long" if long else "short")
    terminal.say(", ".join(f"{folder}/{split}.jsonl: {n} items" for split, n in sizes.items()))
