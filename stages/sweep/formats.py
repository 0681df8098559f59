"""A table of results as Markdown, CSV and LaTeX."""

from __future__ import annotations

import csv
import io
import shlex

from stages.evaluation.statistics import p_value
from stages.sweep.file import FLEXIBLE, Column
from stages.sweep.results import Results, Value


def markdown(results: Results, command: str) -> str:
    """The whole section: title, notes, table, and how it was made.

    command: what makes the cells that are missing.
    """
    file = results.table.file
    head, rows = grid(results)
    lines = [f"## {file.title}", "", *([file.notes.strip(), ""] if file.notes else [])]
    lines += [_line(head), _line(["---"] * len(head)), *map(_line, rows)]
    return "\n".join([*lines, "", legend(results), "", f"`{command}`", ""])


def grid(results: Results) -> tuple[list[str], list[list[str]]]:
    """The heads of the columns, and the cells of each row with its name before them."""
    file, compared = results.table.file, results.comparisons  # none if the other row was not asked for
    head = ["", *file.columns]
    if compared:
        head.append(_compared_with(results))
    rows = []
    for row in results.table.rows:
        cells = [_cell(results, row, name) for name in file.columns]
        if compared:
            cells.append(_compared(results, row))
        rows.append([row, *cells])
    return head, rows


def _compared_with(results: Results) -> str:
    """The head of the column of comparisons."""
    compare = results.table.file.compare
    return f"{compare.on}, less {results.table.against!r}" if compare else ""


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _cell(results: Results, row: str, name: str) -> str:
    if (row, name) not in results.values:
        return "–"
    value = results.values[row, name]
    published = results.table.file.paper.get(row, {}).get(name)
    paper = "" if published is None else f" (paper: {published:g})"
    if value is None:
        return _missing(results, row, name) + paper
    numbers = {one.n for one in results.values.values() if one is not None and one.n is not None}
    items = f", n {value.n}" if value.n is not None and len(numbers) > 1 else ""
    return shown(value) + items + paper


def _missing(results: Results, row: str, name: str) -> str:
    """With the seeds, if only some are missing."""
    seeds = results.missing.get((row, name), [])
    there = {cell.seed for cell in results.table.cells} - set(seeds)
    return f"missing (seed {', '.join(map(str, seeds))})" if there and seeds else "missing"


def shown(value: Value) -> str:
    """`27.1 [24.0, 30.4]` in percent, `+2.0 [-1.0, +5.0], p = .2` for a difference, else the plain number."""
    if value.low is None or value.high is None:
        return f"{value.mean:.4g}"
    if value.p is not None:
        return _points(value.mean, value.low, value.high, value.p)
    return accuracy(value.mean, value.low, value.high)


def accuracy(mean: float, low: float, high: float) -> str:
    """Shares, as percent."""
    return f"{100 * mean:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def _compared(results: Results, row: str) -> str:
    if row not in results.comparisons:
        return ""
    found = results.comparisons[row]
    if found is None:
        return "missing"
    told = _points(found.mean, found.low, found.high, found.p)
    if len(found.of_seeds) > 1:
        told += f"; by seed {', '.join(f'{100 * mean:+z.1f}' for mean in found.of_seeds)}"
    return told


def _points(mean: float, low: float, high: float, p: float) -> str:
    return f"{100 * mean:+z.1f} [{100 * low:+.1f}, {100 * high:+.1f}], {p_value(p)}"


def legend(results: Results) -> str:
    """What the numbers are: items, seeds, intervals."""
    graded = [v for v in results.values.values() if v is not None and v.n is not None]
    seeds = list(dict.fromkeys(cell.seed for cell in results.table.cells))
    said = [f"Seeds {', '.join(map(str, seeds))}."]
    if graded:
        items = sorted({v.n for v in graded if v.n is not None})
        span = f"{items[0]}" if len(items) == 1 else f"{items[0]} to {items[-1]}"
        said.append(
            f"Accuracies in % over {span} items, answers read strictly, in the mean over seeds; 95 % "
            "intervals are over items, each with its mean over seeds."
        )
    cells = results.table.cells
    loose = {(c.row, name) for c in cells for name, column in c.columns.items() if column.rest == FLEXIBLE}
    if loose:
        said.append(f"Read flexibly: {'; '.join(f'{name} of {row}' for row, name in sorted(loose))}.")
    if results.comparisons or any(value.p is not None for value in graded):
        said.append(
            "Differences in points, on the same items and seeds; p by an exact permutation test of their "
            "mean over items (McNemar's where each item is right or wrong), not corrected for the number of "
            "rows. Intervals and p take the training seeds as they are; other seeds may end elsewhere."
        )
    if results.table.replaced:
        rows, base = results.table.replaced, results.table.cells[0].base
        said.append(f"{base} replaces the configs that these rows name: {'; '.join(rows)}.")
    if same := results.table.same:
        told = "; ".join(f"{row} (as {other})" for row, other in same.items())
        said.append(f"Left out, because they are the same as another row here: {told}.")
    return " ".join(said)


def csv_text(results: Results) -> str:
    """One line for each row and column, and each comparison; accuracies, and the paper's, as shares of 1."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["row", "column", "mean", "low", "high", "items", "seeds", "of_seeds", "paper", "p"])
    for (row, name), value in results.values.items():
        published: float | str = results.table.file.paper.get(row, {}).get(name, "")
        if published != "" and Column.of(results.table.file.columns[name]).graded:
            published = round(float(published) / 100, 6)
        if value is None:
            writer.writerow([row, name, "", "", "", "", "", "", published, ""])
            continue
        blank = ["" if x is None else x for x in (value.low, value.high, value.n)]
        of_seeds = " ".join(f"{x:.6g}" for x in value.of_seeds)
        p = "" if value.p is None else value.p
        writer.writerow([row, name, value.mean, *blank, len(value.of_seeds), of_seeds, published, p])
    for row, found in results.comparisons.items():
        if found is not None:
            of_seeds = " ".join(f"{x:.6g}" for x in found.of_seeds)
            numbers = [found.mean, found.low, found.high, found.n, len(found.of_seeds), of_seeds]
            writer.writerow([row, _compared_with(results), *numbers, "", found.p])
    return out.getvalue()


_LATEX = {"&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}"}
_LATEX |= {"~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "\\": r"\textbackslash{}", "θ": r"$\theta$"}
_LATEX |= {"<": "$<$", ">": "$>$", "|": r"\textbar{}"}
_LATEX |= {"α": r"$\alpha$", "β": r"$\beta$", "–": "--", "→": r"$\rightarrow$", "−": "$-$", "×": r"$\times$"}


def latex(results: Results) -> str:
    """A `tabular` with booktabs' rules; items, seeds, and what the numbers are, in comments above it."""
    letters = str.maketrans(_LATEX)
    head, rows = grid(results)
    lines = [
        *(f"% {line}" for line in legend(results).splitlines()),
        r"\begin{tabular}{l" + "r" * (len(head) - 1) + "}",
        r"\toprule",
        " & ".join(name.translate(letters) for name in head) + r" \\",
        r"\midrule",
        *(" & ".join(cell.translate(letters) for cell in cells) + r" \\" for cells in rows),
    ]
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", ""])


def command(arguments: list[str]) -> str:
    return shlex.join(["lorapar", *arguments])
