"""Report on the labels: counts, each voter, agreement, the most contested examples, and known labels."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from stages.config import ClassifySection
from stages.errors import AnswerError
from stages.evaluation.statistics import wilson
from stages.labelling.aggregate import Calibration, VoterResult, auc, rounded
from stages.labelling.known import system_of
from stages.labelling.votes import VoteJournal
from stages.records import Labelled

POOR_AUC = 0.65
"""A voter with a lower AUC on the labelled examples is warned about."""
POOR_MASS = 0.01
"""A constrained choice says little if the label words have less than this share of the probability."""
CONTESTED = 10
"""Number of contested examples in the report."""


def counts(rows: list[Labelled]) -> dict[str, Any]:
    """Numbers of rows: all, by label, and with a gold answer."""
    names = {1: "system1", 2: "system2", None: "undecided"}
    return {
        "examples": len(rows),
        **{name: sum(row.system == system for row in rows) for system, name in names.items()},
        "with_gold": sum(row.example.gold is not None for row in rows),
    }


def content(
    rows: list[Labelled],
    journals: list[VoteJournal],
    results: dict[str, VoterResult],
    calibrations: dict[str, Calibration],
    section: ClassifySection,
) -> dict[str, Any]:
    """Describe the labels and the voters. results, calibrations: by voter."""
    examples = [row.example for row in rows]
    voters = {}
    for journal in journals:
        result, calibration = results[journal.title], calibrations[journal.title]
        valid = len(result.valid)
        voters[journal.title] = {
            "engine": journal.voter.engine,
            "valid": valid,
            "invalid": journal.invalid(examples),
            "failed": dict(Counter(failure.reason for _, failure in journal.failures)),
            "system2_share": len(result.system2_ids) / valid if valid else None,
            "threshold": rounded(result.threshold),
            "calibration": "system2_share" if section.system2_share else calibration.method,
            "mass_on_words": rounded(journal.mass()),
            "held_out_auc": calibration.auc,
            "held_out_interval": calibration.interval,
            "held_out_examples": calibration.examples,
        }
    probabilities = {title: result.valid for title, result in results.items()}
    known = compare_with_known(rows, section.known, probabilities)
    return {
        "rule": section.rule,
        **counts(rows),
        "voters": voters,
        "contested": _contested(rows),
        **({"known": known} if known else {}),
    }


def write(
    content: dict[str, Any], section: ClassifySection, path: Path, say: Callable[[str], None]
) -> dict[str, Any]:
    """Write the report and say its warnings; returns its most important figures, for the manifest."""
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False), encoding="utf-8")
    for warning in _voter_warnings(content["voters"]):
        say(warning)
    if not section.accept_weak:
        _refuse_weak_voters(content["voters"], section.min_auc)
    return _headline(content)


def _refuse_weak_voters(voters: dict[str, Any], min_auc: float) -> None:
    """Raise AnswerError if every voter was tried on known examples, and none reaches `min_auc`."""
    areas = {title: voter["held_out_auc"] for title, voter in voters.items()}
    if all(area is not None and area < min_auc for area in areas.values()):
        tried = ", ".join(f"{title} {area:.2f}" for title, area in areas.items())
        raise AnswerError(
            f"no voter can tell the systems apart: AUC {tried} on labelled examples, 0.5 is chance",
            "a larger model or another persona (lorapar list personas), labels of your own "
            "(classify.strategy: known), or classify.accept_weak: true",
        )


def compare_with_known(
    rows: list[Labelled], field: str, scores: dict[str, dict[str, float]]
) -> dict[str, Any] | None:
    """Agreement of labels with those in `field`, and the AUC of each voter; None if no row has such a label.

    scores: probability of System 2, by voter and example id.
    """
    known = {row.example.id: system for row in rows if (system := system_of(row.example.extra.get(field)))}
    if not known:
        return None
    pairs = [(row.system, known[row.example.id]) for row in rows if row.system and row.example.id in known]
    equal = sum(label == system for label, system in pairs)
    areas = {}
    for title, scores_of in scores.items():
        ids = [id for id in scores_of if id in known]
        areas[title] = auc([scores_of[id] for id in ids], [known[id] == 2 for id in ids])
    return {
        "field": field,
        "n": len(pairs),
        "undecided": len(known) - len(pairs),
        "agreement": equal / len(pairs) if pairs else None,
        "interval": list(wilson(equal, len(pairs))) if pairs else None,
        "auc": areas,
    }


def _contested(rows: list[Labelled]) -> list[dict[str, Any]]:
    """The examples on which voters differ most, by the range of their probabilities."""

    def spread(row: Labelled) -> float:
        values = [value for value in row.votes.values() if value is not None]
        return max(values) - min(values) if values else 0.0

    contested = sorted((row for row in rows if spread(row) > 0), key=spread, reverse=True)[:CONTESTED]
    return [
        {"id": row.example.id, "prompt": row.example.conversation, "system": row.system, "votes": row.votes}
        for row in contested
    ]


def _voter_warnings(voters: dict[str, Any]) -> Iterator[str]:
    for title, voter in voters.items():
        area, mass = voter["held_out_auc"], voter["mass_on_words"]
        if area is not None and area < POOR_AUC:
            low, high = voter["held_out_interval"]
            yield (
                f"warning: {title} hardly tells the systems apart: AUC {area:.2f} [{low:.2f}-{high:.2f}] on "
                f"{voter['held_out_examples']} labelled examples"
            )
        if mass is not None and mass < POOR_MASS:
            yield (
                f"warning: {title} puts {mass:.2%} of its probability on the label words: "
                "it would say something else"
            )


def _headline(content: dict[str, Any]) -> dict[str, Any]:
    """The figures of the report that are shown at the end of classify."""
    headline = {key: content[key] for key in ("examples", "system1", "system2", "undecided", "with_gold")}
    voters = content["voters"]
    headline["votes_system2"] = {title: voter["system2_share"] for title, voter in voters.items()}
    invalid = {title: voter["invalid"] for title, voter in voters.items() if voter["invalid"]}
    failed = {title: sum(voter["failed"].values()) for title, voter in voters.items() if voter["failed"]}
    headline |= {name: numbers for name, numbers in (("invalid", invalid), ("failed", failed)) if numbers}
    if comparison := content.get("known"):
        headline["agrees_with_known"] = comparison["agreement"]
        headline["interval"] = comparison["interval"]
    return headline
