"""Tables for the terminal. rich is imported only when one is drawn."""

from typing import Any

from stages import escaping
from stages.report.page import Grid

WIDEST = 10**4
NARROWEST = 24
"""Least width of a text column, in characters."""


def table(*columns: str, text: str | None = None) -> Any:
    """Create an empty table, whose first column is left-aligned and the others right-aligned.

    text: a column that is left-aligned, too, and may be folded.
    """
    from rich.table import Table

    class SafeTable(Table):
        def add_row(self, *cells: Any, **options: Any) -> None:
            safe = (escaping.terminal(cell) if isinstance(cell, str) else cell for cell in cells)
            super().add_row(*safe, **options)

    rows = SafeTable(box=None, pad_edge=False, header_style="bold")
    for i, column in enumerate(columns):
        to_left = i == 0 or column == text
        rows.add_column(
            escaping.terminal(column),
            justify="left" if to_left else "right",
            overflow="fold",
            no_wrap=column != text,
        )
    return rows


def show_grid(grid: Grid) -> None:
    """Print a table of a report, with its caption below."""
    rows = table(*grid.head)
    for line in grid.rows:
        rows.add_row(*line)
    show(rows)
    if grid.caption:
        print(escaping.terminal(grid.caption))


def show(rows: Any) -> None:
    """Print a table with all its values, even if it becomes wider than a narrow terminal.

    In a file or a pipe nothing is folded, either.
    """
    from rich.cells import cell_len
    from rich.console import Console
    from rich.measure import Measurement

    console = Console(highlight=False, markup=False)
    unfolded = Measurement.get(console, console.options.update(max_width=WIDEST), rows).maximum
    narrowest = unfolded  # with every text column folded to NARROWEST
    for column in rows.columns:
        if not column.no_wrap:
            longest = max(cell_len(str(cell)) for cell in [column.header, *column.cells])
            narrowest -= max(0, longest - NARROWEST)
    console.width = min(unfolded, max(console.width, narrowest)) if console.is_terminal else unfolded
    with console.capture() as capture:
        console.print(rows)
    print("\n".join(line.rstrip() for line in capture.get().splitlines()))
