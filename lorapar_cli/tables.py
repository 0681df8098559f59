"""Tables at a terminal. rich is loaded only when one is drawn."""

from typing import Any

WIDEST = 10**4
NARROWEST = 24
"""Characters that a column of text keeps."""


def table(*columns: str, text: str | None = None) -> Any:
    """An empty table: the first column to the left, the others to the right.

    text: the column that may be folded, to the left, too.
    """
    from rich.table import Table

    found = Table(box=None, pad_edge=False, header_style="bold")
    for i, column in enumerate(columns):
        left = i == 0 or column == text
        found.add_column(column, justify="left" if left else "right", overflow="fold", no_wrap=column != text)
    return found


def show(drawn: Any) -> None:
    """Print a table whole: wider than a narrow terminal rather than without a part of its values.

    Into a file or a pipe nothing is folded either.
    """
    from rich.cells import cell_len
    from rich.console import Console
    from rich.measure import Measurement

    console = Console(highlight=False, markup=False)
    whole = Measurement.get(console, console.options.update(max_width=WIDEST), drawn).maximum
    least = whole
    for column in drawn.columns:
        if not column.no_wrap:
            longest = max(cell_len(str(cell)) for cell in [column.header, *column.cells])
            least -= max(0, longest - NARROWEST)
    console.width = min(whole, max(console.width, least)) if console.is_terminal else whole
    with console.capture() as caught:
        console.print(drawn)
    print("\n".join(line.rstrip() for line in caught.get().splitlines()))


def percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f}"
