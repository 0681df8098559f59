"""The report of the labels: counts, agreement, what each voter did, the most contested examples, labels known from elsewhere."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from stages.config import ClassifySection
from stages.labelling.agreement import SURFACE, kappas, neighbours, surface, with_known
from stages.labelling.calibration import POOR_AUC, POOR_MASS, Calibration
from stages.labelling.decide import Voice
from stages.labelling.votes import Votes
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
    boxes: list[Votes],
    held: dict[str, Voice],
    twos: dict[str, set[str]],
    found: dict[str, Calibration],
    section: ClassifySection,
    path: Path,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Write the report and say what a person should know; returns its head for the manifest."""
    whole: dict[str, Any] = {"rule": section.rule, **counts(rows), "voters": {}}
    examples = [row.example for row in rows]
    for box in boxes:
        voice, calibration = held[box.title], found[box.title]
        valid = [id for id, value in voice.given.items() if value is not None]
        whole["voters"][box.title] = {
            "engine": box.voter.engine,
            "asked_now": box.asked,
            "valid": len(valid),
            "invalid": box.invalid(examples),
            "failed": dict(Counter(failure.reason for _, failure in box.failures)),
            "system2_share": len(twos[box.title]) / len(valid) if valid else None,
            "threshold": voice.threshold,
            "calibration": "system2_share" if section.system2_share else calibration.method,
            "mass_on_words": box.mass(),
            "held_out_auc": calibration.auc,
            "held_out_interval": calibration.interval,
            "held_out_examples": calibration.examples,
        }
    said = {
        title: {id: 2 if id in twos[title] else 1 for id, value in voice.given.items() if value is not None}
        for title, voice in held.items()
    }
    whole["agreement"] = kappas(said)
    whole["contested"] = _contested(rows)
    known = {
        row.example.id: system for row in rows if (system := row.example.extra.get(section.known)) in (1, 2)
    }
    if known:
        voters = {
            title: {i: v for i, v in voice.given.items() if v is not None} for title, voice in held.items()
        }
        labels = {row.example.id: row.system for row in rows}
        plain = surface([example for example in examples if example.id in known])
        plain[TOGETHER] = neighbours(plain, known)
        whole["known"] = {"field": section.known, **with_known(known, labels, {**voters, **plain})}
    path.write_text(json.dumps(whole, indent=1, ensure_ascii=False), encoding="utf-8")
    for warning in _warnings(whole):
        say(warning)
    return _head(whole)


def _contested(rows: list[Labelled]) -> list[dict[str, Any]]:
    """The examples about which voters differ most, by the spread of their probabilities."""

    def spread(row: Labelled) -> float:
        values = [value for value in row.votes.values() if value is not None]
        return max(values) - min(values) if values else 0.0

    worst = sorted((row for row in rows if spread(row) > 0), key=spread, reverse=True)[:CONTESTED]
    return [
        {"id": r.example.id, "prompt": r.example.prompt, "system": r.system, "votes": r.votes} for r in worst
    ]


def _warnings(whole: dict[str, Any]) -> list[str]:
    found = []
    for title, voter in whole["voters"].items():
        area, mass = voter["held_out_auc"], voter["mass_on_words"]
        if area is not None and area < POOR_AUC:
            low, high = voter["held_out_interval"]
            found.append(
                f"warning: {title} hardly tells the systems apart: AUC {area:.2f} [{low:.2f}-{high:.2f}] on "
                f"{voter['held_out_examples']} labelled examples"
            )
        if mass is not None and mass < POOR_MASS:
            found.append(
                f"warning: {title} puts {mass:.2%} of its probability on the label words: it would say something else"
            )
    if known := whole.get("known"):
        areas = {title: area[0] for title, area in known["auc"].items() if area}
        reached = max((area for title, area in areas.items() if title in whole["voters"]), default=0.0)
        # A single score may stand for either system; what is fitted to labels may not.
        plain = {title: max(area, 1 - area) for title, area in areas.items() if title in SURFACE}
        plain |= {TOGETHER: areas[TOGETHER]} if TOGETHER in areas else {}
        best = max(plain, key=plain.__getitem__, default="")
        if plain and plain[best] >= reached:
            found.append(
                f"warning: the question's surface alone ({best}) separates the known labels as well as the best voter "
                f"(AUC {plain[best]:.2f} and {reached:.2f}): agreement does not show that anything was read"
            )
        always = max(known[f"known {k} labelled 1"] + known[f"known {k} labelled 2"] for k in (1, 2)) / max(
            known["n"], 1
        )
        if known["interval"] is not None and known["interval"][0] <= always:
            low, high = known["interval"]
            found.append(
                f"warning: the labels agree with {known['field']} in {known['agreement']:.0%} [{low:.0%}-{high:.0%}] of the rows; "
                f"one label for all would in {always:.0%}"
            )
    return found


def _head(whole: dict[str, Any]) -> dict[str, Any]:
    """What of the report a person sees at once."""
    head = {key: whole[key] for key in ("examples", "system1", "system2", "undecided", "with_gold")}
    if whole["agreement"].get("fleiss_kappa") is not None:
        head["fleiss_kappa"] = whole["agreement"]["fleiss_kappa"]
    head["votes_system2"] = {title: voter["system2_share"] for title, voter in whole["voters"].items()}
    for name in ("invalid", "failed"):
        number = {
            t: n
            for t, v in whole["voters"].items()
            if (n := v[name] if name == "invalid" else sum(v[name].values()))
        }
        if number:
            head[name] = number
    if known := whole.get("known"):
        head["agrees_with_known"] = known["agreement"]
        head["interval"] = known["interval"]
    return head
