"""Quality of labels: how well votes separate known ones, and how often labels agree with them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from stages.evaluation.statistics import Z, wilson

CHANCE = 0.5
"""AUC of a guess."""


def auc(scores: Sequence[float], is_system2: Sequence[bool]) -> tuple[float, tuple[float, float]] | None:
    """Area under the ROC curve with its 95 % interval (Hanley and McNeil 1982); None with one class only.

    It is the probability that a System 2 item has a higher score than a System 1 item; a tie counts half.
    """
    from scipy.stats import mannwhitneyu

    pairs = list(zip(scores, is_system2, strict=True))
    of_system1, of_system2 = ([score for score, is_2 in pairs if is_2 is which] for which in (False, True))
    n2, n1 = len(of_system2), len(of_system1)
    if not n2 or not n1:
        return None
    # U counts the pairs in which the System 2 item has the higher score. Only U is used: the asymptotic
    # p-value is the cheapest one.
    area = float(mannwhitneyu(of_system2, of_system1, method="asymptotic").statistic) / (n2 * n1)
    # Hanley and McNeil: q2 is the probability that two System 2 items both score higher than one System 1
    # item, q1 that one System 2 item scores higher than two System 1 items, if scores are exponential.
    q2, q1 = area / (2 - area), 2 * area**2 / (1 + area)
    variance = area * (1 - area) + (n2 - 1) * (q2 - area**2) + (n1 - 1) * (q1 - area**2)  # times n1 n2
    margin = Z * math.sqrt(max(variance, 0.0) / (n2 * n1))
    return area, (max(0.0, area - margin), min(1.0, area + margin))


def compare_with_known(
    known_labels: dict[str, int], labels: dict[str, int | None], scores: dict[str, dict[str, float]]
) -> dict[str, Any]:
    """Agreement of labels with known ones (Wilson interval), and the AUC of each score for the known labels.

    scores: for each voter, a number per example id that should be higher for System 2.
    """
    pairs = [(labels[id], system) for id, system in known_labels.items() if labels.get(id)]
    equal = sum(label == system for label, system in pairs)
    table = {f"known {k} labelled {j}": pairs.count((j, k)) for k in (1, 2) for j in (1, 2)}
    areas = {}
    for title, scores_of in scores.items():
        ids = [id for id in scores_of if id in known_labels]
        areas[title] = auc([scores_of[id] for id in ids], [known_labels[id] == 2 for id in ids])
    return {
        "n": len(pairs),
        "undecided": len(known_labels) - len(pairs),
        "agreement": equal / len(pairs) if pairs else None,
        "interval": list(wilson(equal, len(pairs))) if pairs else None,
        **table,
        "auc": areas,
    }
