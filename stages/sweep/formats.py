"""Renders a table of results as Markdown, CSV and LaTeX."""

from __future__ import annotations

import csv
import io
import re

from stages import escaping
from stages.evaluation.statistics import p_value
from stages.sweep.file import FLEXIBLE, Column
from stages.sweep.results import Results, Value


def markdown(results: Results, command: str) -> str:
    """Render a section: title, notes, table, legend and command.

    command: the command line that makes missing cells.
    """
    file = results.table.file
    head, rows = grid(results)
    lines = [f"## {escaping.markdown(file.title)}", ""]
    for paragraph in re.split(r"\n\s*\n", file.notes.strip()):
        lines += [escaping.markdown(paragraph), ""] if paragraph else []
    lines += [_markdown_line(list(map(escaping.markdown, head))), _markdown_line(["---"] * len(head))]
    # Cells other than the name of the row are numbers, and words of our own.
    lines += [_markdown_line([escaping.markdown(row), *cells]) for row, *cells in rows]
    legend_text = escaping.markdown(legend(results))
    return "\n".join([*lines, "", legend_text, "", escaping.markdown_code(command), ""])


def grid(results: Results) -> tuple[list[str], list[list[str]]]:
    """Return the column heads and the rows of cells; the first cell of a row is its name."""
    file, compared = results.table.file, results.comparisons  # empty if --only leaves out the reference row
    head = ["", *file.columns]
    if compared:
        head.append(_comparison_head(results))
    rows = []
    for row in results.table.rows:
        cells = [_cell(results, row, name) for name in file.columns]
        if compared:
            cells.append(_comparison(results, row))
        rows.append([row, *cells])
    return head, rows


def _comparison_head(results: Results) -> str:
    compare = results.table.file.compare
    return f"{compare.on}, less {results.table.against!r}" if compare else ""


def _markdown_line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _cell(results: Results, row: str, name: str) -> str:
    if (row, name) not in results.values:
        return "–"
    value = results.values[row, name]
    published = results.table.file.paper.get(row, {}).get(name)
    paper = "" if published is None else f" (paper: {published:g})"
    if value is None:
        return _missing(results, row, name) + paper
    # n stands in the legend, unless it differs between cells.
    sizes = {v.n for v in results.values.values() if v is not None and v.n is not None}
    items = f", n {value.n}" if value.n is not None and len(sizes) > 1 else ""
    return shown(value) + items + paper


def _missing(results: Results, row: str, name: str) -> str:
    """Return `missing`, with the missing seeds if others exist."""
    seeds = results.missing.get((row, name), [])
    complete = {cell.seed for cell in results.table.cells} - set(seeds)
    return f"missing (seed {', '.join(map(str, seeds))})" if complete and seeds else "missing"


def shown(value: Value) -> str:
    """Format an accuracy as `27.1 [24.0, 30.4]` (%), a difference as `+2.0 [-1.0, +5.0], p = .2`."""
    if value.low is None or value.high is None:
        return f"{value.mean:.4g}"
    if value.p is not None:
        return _points(value.mean, value.low, value.high, value.p)
    return accuracy(value.mean, value.low, value.high)


def accuracy(mean: float, low: float, high: float) -> str:
    """Format an accuracy and its interval, given in [0, 1], in percent."""
    return f"{100 * mean:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def _comparison(results: Results, row: str) -> str:
    if row not in results.comparisons:
        return ""
    comparison = results.comparisons[row]
    if comparison is None:
        return "missing"
    text = _points(comparison.mean, comparison.low, comparison.high, comparison.p)
    if len(comparison.of_seeds) > 1:
        text += f"; by seed {', '.join(f'{100 * mean:+z.1f}' for mean in comparison.of_seeds)}"
    return text


def _points(mean: float, low: float, high: float, p: float) -> str:
    """Format a difference in percentage points."""
    return f"{100 * mean:+z.1f} [{100 * low:+.1f}, {100 * high:+.1f}], {p_value(p)}"


def legend(results: Results) -> str:
    """Explain the numbers: seeds, items, intervals and tests, and the rows that are left out."""
    graded = [v for v in results.values.values() if v is not None and v.n is not None]
    seeds = list(dict.fromkeys(cell.seed for cell in results.table.cells))
    sentences = [f"Seeds {', '.join(map(str, seeds))}."]
    if graded:
        items = sorted({v.n for v in graded if v.n is not None})
        span = f"{items[0]}" if len(items) == 1 else f"{items[0]} to {items[-1]}"
        sentences.append(
            f"Accuracies are in %, over {span} items with strictly parsed answers, averaged over seeds; 95 % "
            "intervals are over items, each averaged over seeds."
        )
    flexible = {
        (cell.row, name)
        for cell in results.table.cells
        for name, column in cell.columns.items()
        if column.qualifier == FLEXIBLE
    }
    if flexible:
        sentences.append(
            f"Parsed flexibly: {'; '.join(f'{name} of {row}' for row, name in sorted(flexible))}."
        )
    if results.comparisons or any(value.p is not None for value in graded):
        sentences.append(
            "Differences are in percentage points, on the same items and seeds; p is from an exact "
            "permutation test of their mean over items (McNemar's where each item is right or wrong), not "
            "corrected for the number of rows. Intervals and p treat the training seeds as fixed; other "
            "seeds may end elsewhere."
        )
    if results.table.rebased_rows:
        rows, base = results.table.rebased_rows, results.table.cells[0].base
        sentences.append(f"{base} replaces the configs that these rows name: {'; '.join(rows)}.")
    if results.table.duplicate_of:
        pairs = "; ".join(f"{row} (as {first})" for row, first in results.table.duplicate_of.items())
        sentences.append(f"Left out, because they are the same as another row here: {pairs}.")
    return " ".join(sentences)


def csv_text(results: Results) -> str:
    """Render one line per value and per comparison; accuracies, also published ones, are in [0, 1]."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["row", "column", "mean", "low", "high", "items", "seeds", "of_seeds", "paper", "p"])
    for (row, name), value in results.values.items():
        published: float | str = results.table.file.paper.get(row, {}).get(name, "")
        if published != "" and Column.of(results.table.file.columns[name]).graded:
            published = round(float(published) / 100, 6)
        if value is None:
            writer.writerow([*map(escaping.csv_cell, (row, name)), "", "", "", "", "", "", published, ""])
            continue
        blank = ["" if x is None else x for x in (value.low, value.high, value.n)]
        of_seeds = " ".join(f"{x:.6g}" for x in value.of_seeds)
        p = "" if value.p is None else value.p
        names = map(escaping.csv_cell, (row, name))
        writer.writerow([*names, value.mean, *blank, len(value.of_seeds), of_seeds, published, p])
    for row, comparison in results.comparisons.items():
        if comparison is not None:
            of_seeds = " ".join(f"{x:.6g}" for x in comparison.of_seeds)
            numbers = comparison.mean, comparison.low, comparison.high, comparison.n, len(comparison.of_seeds)
            names = map(escaping.csv_cell, (row, _comparison_head(results)))
            writer.writerow([*names, *numbers, of_seeds, "", comparison.p])
    return out.getvalue()


def latex(results: Results) -> str:
    """Render a `tabular` with booktabs rules, with the legend in comments above it."""
    head, rows = grid(results)
    lines = [
        f"% {escaping.one_line(legend(results))}",
        r"\begin{tabular}{l" + "r" * (len(head) - 1) + "}",
        r"\toprule",
        " & ".join(map(escaping.latex, head)) + r" \\",
        r"\midrule",
        *(" & ".join(map(escaping.latex, cells)) + r" \\" for cells in rows),
    ]
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", ""])


def command(arguments: list[str]) -> str:
    """Quote a `lorapar` command line for the shell."""
    return " ".join(map(escaping.shell, ["lorapar", *arguments]))
