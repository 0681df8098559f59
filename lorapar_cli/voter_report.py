"""The report of the labels, as a person reads it."""

import json
from pathlib import Path
from typing import Any

from lorapar_cli.tables import percent, show, table

SHOWN_CONTESTED = 3


def report(folder: Path) -> None:
    """Print what report.json of a classify artifact says; nothing where labels were drawn at random."""
    if not (folder / "report.json").is_file():
        return
    found = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    known = found.get("known", {})
    _voters(found["voters"])
    if found["agreement"].get("pairs"):
        _pairs(found["agreement"])
    if known:
        _known(known, found["voters"])
    if found["contested"]:
        print("most contested:")
    for row in found["contested"][:SHOWN_CONTESTED]:
        votes = ", ".join("–" if value is None else f"{value:.2f}" for value in row["votes"].values())
        print(f"  System {row['system'] or '–'} from {votes}: {' '.join(row['prompt'].split())[:90]}")


def _voters(voters: dict[str, Any]) -> None:
    rows = table("voter", "votes 2", "invalid", "failed", "threshold", "held-out AUC", "weight")
    for title, voter in voters.items():
        area = _area(voter["held_out_auc"] and (voter["held_out_auc"], voter["held_out_interval"]))
        weight = "" if voter["mass_on_words"] is None else f"{voter['mass_on_words']:.1%}"
        bad = (str(voter["invalid"]), str(sum(voter["failed"].values())))
        rows.add_row(
            title, f"{percent(voter['system2_share'])}%", *bad, f"{voter['threshold']:.3f}", area, weight
        )
    show(rows)
    print("weight: what of the voter's probability falls on its two words")


def _pairs(agreement: dict[str, Any]) -> None:
    rows = table("pair of voters", "equal", "Cohen's kappa")
    for pair, found in agreement["pairs"].items():
        kappa = "–" if found["kappa"] is None else f"{found['kappa']:.2f}"
        if found["interval"]:
            kappa += f" [{found['interval'][0]:.2f}–{found['interval'][1]:.2f}]"
        rows.add_row(pair, f"{percent(found['equal'])}%", kappa)
    if agreement["fleiss_kappa"] is not None and len(agreement["pairs"]) > 1:
        rows.add_row("all, Fleiss' kappa", "", f"{agreement['fleiss_kappa']:.2f}")
    show(rows)


def _known(known: dict[str, Any], voters: dict[str, Any]) -> None:
    """Agreement with labels known from elsewhere, and each voter's AUC beside what needs no model."""
    rows = table(f"against {known['field']}", "AUC [95 %]")
    for title, area in known["auc"].items():
        rows.add_row(title if title in voters else f"{title} (no model)", _area(area))
    show(rows)
    if known["agreement"] is not None:
        low, high = known["interval"]
        interval = f"[{percent(low)}–{percent(high)}]"
        print(
            f"labels agree with {known['field']}: {percent(known['agreement'])} % {interval} of {known['n']}"
        )


def _area(found: Any) -> str:
    return f"{found[0]:.2f} [{found[1][0]:.2f}–{found[1][1]:.2f}]" if found else "–"
