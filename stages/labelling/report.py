"""The report of the labels: counts, each voter, agreement, the most contested examples, and known labels."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from stages.config import ClassifySection
from stages.labelling.aggregate import VoterResult, rounded
from stages.labelling.agreement import SURFACE, kappas, neighbours, surface, with_known
from stages.labelling.calibration import POOR_AUC, POOR_MASS, Calibration
from stages.labelling.known import system_of
from stages.labelling.votes import VoterLog
from stages.records import Labelled

CONTESTED = 10
TOGETHER = "these together"


def counts(rows: list[Labelled]) -> dict[str, Any]:
    names = {1: "system1", 2: "system2", None: "undecided"}
    return {
        "examples": len(rows),
        **{name: sum(row.system == system for row in rows) for system, name in names.items()},
        "with_gold": sum(row.example.gold is not None for row in rows),
    }


def report(
    rows: list[Labelled],
    boxes: list[VoterLog],
    held: dict[str, VoterResult],
    twos: dict[str, set[str]],
    found: dict[str, Calibration],
    section: ClassifySection,
    path: Path,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Write the report to `path` and say its warnings; returns its most important figures, for the manifest.

    held, twos, found: per voter, its voice, the examples it votes 2, and its calibration.
    """
    valid = {
        title: {id: value for id, value in voice.given.items() if value is not None}
        for title, voice in held.items()
    }
    examples = [row.example for row in rows]
    whole: dict[str, Any] = {"rule": section.rule, **counts(rows), "voters": {}}
    for box in boxes:
        calibration, given = found[box.title], valid[box.title]
        whole["voters"][box.title] = {
            "engine": box.voter.engine,
            "valid": len(given),
            "invalid": box.invalid(examples),
            "failed": dict(Counter(failure.reason for _, failure in box.failures)),
            "system2_share": len(twos[box.title]) / len(given) if given else None,
            "threshold": rounded(held[box.title].threshold),
            "calibration": "system2_share" if section.system2_share else calibration.method,
            "mass_on_words": rounded(box.mass()),
            "held_out_auc": calibration.auc,
            "held_out_interval": calibration.interval,
            "held_out_examples": calibration.examples,
        }
    said = {title: {id: 2 if id in twos[title] else 1 for id in given} for title, given in valid.items()}
    whole["agreement"] = kappas(said)
    whole["contested"] = _contested(rows)
    if known := _known(rows, section.known, valid):
        whole["known"] = known
    path.write_text(json.dumps(whole, indent=1, ensure_ascii=False), encoding="utf-8")
    for warning in _warnings(whole):
        say(warning)
    return _head(whole)


def _known(rows: list[Labelled], field: str, votes: dict[str, dict[str, float]]) -> dict[str, Any] | None:
    """Comparison of labels, votes and surface scores with the labels in `field`; None if no row has one."""
    known: dict[str, int] = {}
    for row in rows:
        if system := system_of(row.example.extra.get(field)):
            known[row.example.id] = system
    if not known:
        return None
    labels = {row.example.id: row.system for row in rows}
    plain = surface([row.example for row in rows if row.example.id in known])
    plain[TOGETHER] = neighbours(plain, known)
    return {"field": field, **with_known(known, labels, {**votes, **plain})}


def _contested(rows: list[Labelled]) -> list[dict[str, Any]]:
    """The examples on which voters differ most, by the range of their probabilities."""

    def spread(row: Labelled) -> float:
        values = [value for value in row.votes.values() if value is not None]
        return max(values) - min(values) if values else 0.0

    worst = sorted((row for row in rows if spread(row) > 0), key=spread, reverse=True)[:CONTESTED]
    return [
        {"id": r.example.id, "prompt": r.example.prompt, "system": r.system, "votes": r.votes} for r in worst
    ]


def _warnings(whole: dict[str, Any]) -> list[str]:
    known = whole.get("known")
    return _of_voters(whole["voters"]) + (_of_known(known, set(whole["voters"])) if known else [])


def _of_voters(voters: dict[str, Any]) -> list[str]:
    """Warnings about voters whose answers mean little."""
    found = []
    for title, voter in voters.items():
        area, mass = voter["held_out_auc"], voter["mass_on_words"]
        if area is not None and area < POOR_AUC:
            low, high = voter["held_out_interval"]
            found.append(
                f"warning: {title} hardly tells the systems apart: AUC {area:.2f} [{low:.2f}-{high:.2f}] on "
                f"{voter['held_out_examples']} labelled examples"
            )
        if mass is not None and mass < POOR_MASS:
            found.append(
                f"warning: {title} puts {mass:.2%} of its probability on the label words: "
                "it would say something else"
            )
    return found


def _of_known(known: dict[str, Any], voters: set[str]) -> list[str]:
    """Warnings about an agreement with known labels that could be had without reading the questions."""
    found = []
    areas = {title: area[0] for title, area in known["auc"].items() if area}
    reached = max((area for title, area in areas.items() if title in voters), default=0.0)
    # A surface score may be high for either system; the neighbours' score, fitted to labels, may not.
    plain = {title: max(area, 1 - area) for title, area in areas.items() if title in SURFACE}
    plain |= {TOGETHER: areas[TOGETHER]} if TOGETHER in areas else {}
    best = max(plain, key=plain.__getitem__, default="")
    if plain and plain[best] >= reached:
        found.append(
            f"warning: the question's surface alone ({best}) separates the known labels as well as the best "
            f"voter (AUC {plain[best]:.2f} and {reached:.2f}): agreement does not show that anything was read"
        )
    larger = max(known[f"known {k} labelled 1"] + known[f"known {k} labelled 2"] for k in (1, 2))
    always = larger / max(known["n"], 1)
    if known["interval"] is not None and known["interval"][0] <= always:
        low, high = known["interval"]
        found.append(
            f"warning: the labels agree with {known['field']} in {known['agreement']:.0%} "
            f"[{low:.0%}-{high:.0%}] of the rows; one label for all would in {always:.0%}"
        )
    return found


def _head(whole: dict[str, Any]) -> dict[str, Any]:
    """The figures of the report that are shown at the end of classify."""
    head = {key: whole[key] for key in ("examples", "system1", "system2", "undecided", "with_gold")}
    if whole["agreement"].get("fleiss_kappa") is not None:
        head["fleiss_kappa"] = whole["agreement"]["fleiss_kappa"]
    head["votes_system2"] = {title: voter["system2_share"] for title, voter in whole["voters"].items()}
    voters = whole["voters"]
    invalid = {title: voter["invalid"] for title, voter in voters.items() if voter["invalid"]}
    failed = {title: sum(voter["failed"].values()) for title, voter in voters.items() if voter["failed"]}
    head |= {name: number for name, number in (("invalid", invalid), ("failed", failed)) if number}
    if known := whole.get("known"):
        head["agrees_with_known"] = known["agreement"]
        head["interval"] = known["interval"]
    return head
