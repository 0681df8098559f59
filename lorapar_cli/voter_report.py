"""Terminal output of a classify artifact's voter report."""

import json
from pathlib import Path
from typing import Any

from lorapar_cli.tables import show, table
from stages import escaping
from stages.report.comparison import percent

MAX_CONTESTED = 3


def report(folder: Path) -> None:
    """Print report.json of a classify artifact; nothing if there is none, as where labels are random."""
    if not (folder / "report.json").is_file():
        return
    votes = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    _voters(votes["voters"])
    if votes["agreement"].get("pairs"):
        _pairs(votes["agreement"])
    if reference := votes.get("known", {}):
        _reference(reference, votes["voters"])
    if votes["contested"]:
        print("most contested:")
    for row in votes["contested"][:MAX_CONTESTED]:
        values = ", ".join("–" if value is None else f"{value:.2f}" for value in row["votes"].values())
        prompt = escaping.one_line(" ".join(row["prompt"].split()))[:90]
        print(f"  System {row['system'] or '–'} from {values}: {prompt}")


def _voters(voters: dict[str, Any]) -> None:
    rows = table("voter", "votes 2", "invalid", "failed", "threshold", "held-out AUC", "weight")
    for title, voter in voters.items():
        rows.add_row(
            title,
            f"{percent(voter['system2_share'])}%",
            str(voter["invalid"]),
            str(sum(voter["failed"].values())),
            f"{voter['threshold']:.3f}",
            _area(voter["held_out_auc"], voter["held_out_interval"]),
            "" if voter["mass_on_words"] is None else f"{voter['mass_on_words']:.1%}",
        )
    show(rows)
    print("weight: share of the voter's probability that falls on its two words")


def _pairs(agreement: dict[str, Any]) -> None:
    rows = table("pair of voters", "equal", "Cohen's kappa")
    for names, pair in agreement["pairs"].items():
        kappa = "–" if pair["kappa"] is None else f"{pair['kappa']:.2f}"
        if pair["interval"]:
            kappa += f" [{pair['interval'][0]:.2f}–{pair['interval'][1]:.2f}]"
        rows.add_row(names, f"{percent(pair['equal'])}%", kappa)
    if agreement["fleiss_kappa"] is not None and len(agreement["pairs"]) > 1:
        rows.add_row("all, Fleiss' kappa", "", f"{agreement['fleiss_kappa']:.2f}")
    show(rows)


def _reference(reference: dict[str, Any], voters: dict[str, Any]) -> None:
    """Print the agreement with known labels, and the AUC of each voter and of scores without a model."""
    rows = table(f"against {reference['field']}", "AUC [95 %]")
    for title, area in reference["auc"].items():
        rows.add_row(title if title in voters else f"{title} (no model)", _area(*(area or (None, None))))
    show(rows)
    if reference["agreement"] is not None:
        low, high = reference["interval"]
        share = f"{percent(reference['agreement'])} % [{percent(low)}–{percent(high)}]"
        print(f"labels agree with {reference['field']}: {share} of {reference['n']}")


def _area(value: float | None, interval: Any) -> str:
    """Format an AUC, which is None if it could not be measured, and its interval (low, high)."""
    return "–" if value is None else f"{value:.2f} [{interval[0]:.2f}–{interval[1]:.2f}]"
