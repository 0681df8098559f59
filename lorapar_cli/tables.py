"""Tables at a terminal. rich is loaded only when one is drawn."""

from typing import Any


def table(*columns: str) -> Any:
    """An empty table: the first column to the left, the others to the right."""
    from rich.table import Table

    found = Table(box=None, pad_edge=False, header_style="bold")
    for i, column in enumerate(columns):
        found.add_column(column, justify="left" if i == 0 else "right", overflow="fold", no_wrap=i > 0)
    return found


def show(thing: Any) -> None:
    from rich.console import Console

    Console(highlight=False).print(thing)


def percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f}"
