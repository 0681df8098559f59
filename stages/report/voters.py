"""The votes of a classify artifact as a table, for the terminal and the page."""

from pathlib import Path

from stages.records import read_json
from stages.report.comparison import percent
from stages.report.page import Grid


def grid(folder: Path) -> Grid | None:
    """Tabulate report.json of a classify artifact; None if there is none, as where labels are random."""
    if not (folder / "report.json").is_file():
        return None
    report = read_json(folder / "report.json")
    rows = []
    for title, voter in report["voters"].items():
        auc, (low, high) = voter["held_out_auc"], voter["held_out_interval"] or (0, 0)
        area = "–" if auc is None else f"{auc:.2f} [{low:.2f}–{high:.2f}]"
        rows.append([title, percent(voter["system2_share"]), area])
    known, text = report.get("known"), ""
    if known:
        text = f"{percent(known['agreement'])} % of {known['n']} labels are those in {known['field']}."
    return Grid(["voter", "System 2, %", "held-out AUC"], rows, text)
