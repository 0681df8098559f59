"""Report on the labels: each voter, how well it tells known examples apart, and known labels."""

from collections import Counter
from collections.abc import Callable
from typing import Any

from stages.config import ClassifySection
from stages.errors import AnswerError
from stages.evaluation.statistics import wilson
from stages.labelling.aggregate import Calibration, VoterResult, auc, rounded
from stages.labelling.known import system_of
from stages.labelling.votes import VoteJournal
from stages.records import Labelled


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
    known_field: str,
) -> dict[str, Any]:
    """Describe the voters, and how the labels agree with known ones. results, calibrations: by voter."""
    examples = [row.example for row in rows]
    voters = {}
    for journal in journals:
        result, calibration = results[journal.title], calibrations[journal.title]
        valid = len(result.valid)
        voters[journal.title] = {
            "valid": valid,
            "invalid": journal.invalid(examples),
            "failed": dict(Counter(failure.reason for _, failure in journal.failures)),
            "system2_share": len(result.system2_ids) / valid if valid else None,
            "threshold": rounded(result.threshold),
            "held_out_auc": calibration.auc,
            "held_out_interval": calibration.interval,
            "held_out_examples": calibration.examples,
        }
    known = compare_with_known(rows, known_field, {title: result.valid for title, result in results.items()})
    return {"voters": voters, **({"known": known} if known else {})}


def check_voters(voters: dict[str, Any], section: ClassifySection, say: Callable[[str], None]) -> None:
    """Warn of each voter that hardly tells known examples apart.

    AnswerError instead if no voter reaches `min_auc` on known examples, and that was not accepted.
    """
    areas = {title: voter["held_out_auc"] for title, voter in voters.items()}
    weak = {title: area for title, area in areas.items() if area is not None and area < section.min_auc}
    if len(weak) == len(voters) and not section.accept_weak:
        tried = ", ".join(f"{title} {area:.2f}" for title, area in weak.items())
        raise AnswerError(
            f"no voter can tell the systems apart: AUC {tried} on labelled examples, 0.5 is chance",
            "a larger model or another persona (lorapar list personas), labels of your own "
            "(classify.strategy: known), or classify.accept_weak: true",
        )
    for title, area in weak.items():
        (low, high), number = voters[title]["held_out_interval"], voters[title]["held_out_examples"]
        interval = f"AUC {area:.2f} [{low:.2f}-{high:.2f}] on {number} labelled examples"
        say(f"warning: {title} hardly tells the systems apart: {interval}")


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
    for title, of_voter in scores.items():
        of_systems = ([score for id, score in of_voter.items() if known.get(id) == k] for k in (1, 2))
        areas[title] = auc(*of_systems)
    return {
        "field": field,
        "n": len(pairs),
        "undecided": len(known) - len(pairs),
        "agreement": equal / len(pairs) if pairs else None,
        "interval": list(wilson(equal, len(pairs))) if pairs else None,
        "auc": areas,
    }
