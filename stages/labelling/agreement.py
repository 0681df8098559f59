"""Quality of labels: agreement between voters, with known labels, and with scores that need no model."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from itertools import combinations
from typing import Any

from stages.evaluation.statistics import Z, wilson
from stages.records import Example

YES_NO = re.compile(
    r"(is|are|was|were|do|does|did|can|could|would|should|will|has|have|had)\b[^.?!]*\?\s*$",
    re.IGNORECASE | re.MULTILINE,
)

SURFACE: dict[str, Callable[[str], float]] = {
    "words": lambda text: len(text.split()),
    "numbers": lambda text: len(re.findall(r"\d+(?:[.,]\d+)*", text)),
    "yes/no form": lambda text: bool(YES_NO.match(text.strip())),
}
"""Scores of a question's length and form, made without reading it: a voter should do better than these."""

NEIGHBOURS = 5
"""Number of nearest examples that `neighbour_scores` averages."""
MAX_COMPARED = 2000
"""Number of examples that `neighbour_scores` compares, all pairs of them."""
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


def kappas(votes: dict[str, dict[str, int]]) -> dict[str, Any]:
    """Fleiss' kappa of all voters and Cohen's kappa of each pair, on the examples for which all voted.

    votes: for each voter, 1 or 2 per example id. Cohen's kappa has a 95 % interval where each of the two gave
    both votes: else it is 0 by definition. A kappa is None where all votes are equal, and it does not exist.
    """
    import numpy as np
    from statsmodels.stats.inter_rater import aggregate_raters, cohens_kappa, fleiss_kappa

    common = sorted(set.intersection(*(set(votes_of) for votes_of in votes.values())))
    if len(votes) < 2 or not common:
        return {}
    table = np.array([[votes_of[id] for votes_of in votes.values()] for id in common])  # (examples, voters)
    differ = len(np.unique(table)) > 1
    fleiss = float(fleiss_kappa(aggregate_raters(table, n_cat=None)[0])) if differ else None
    pairs = {}
    for (a, first), (b, second) in combinations(enumerate(votes), 2):
        counts = np.zeros((2, 2))  # (vote of a, vote of b)
        np.add.at(counts, (table[:, a] - 1, table[:, b] - 1), 1)
        equal = float((table[:, a] == table[:, b]).mean())
        kappa = interval = None
        if all(len(np.unique(table[:, voter])) > 1 for voter in (a, b)):
            cohen = cohens_kappa(counts)
            kappa, interval = float(cohen.kappa), [float(cohen.kappa_low), float(cohen.kappa_upp)]
        elif len(np.unique(table[:, [a, b]])) > 1:
            kappa = 0.0
        pairs[f"{first} | {second}"] = {"equal": equal, "kappa": kappa, "interval": interval}
    return {"examples": len(common), "fleiss_kappa": fleiss, "pairs": pairs}


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


def surface_scores(examples: list[Example]) -> dict[str, dict[str, float]]:
    return {name: {e.id: float(score(e.conversation)) for e in examples} for name, score in SURFACE.items()}


def neighbour_scores(scores: dict[str, dict[str, float]], known_labels: dict[str, int]) -> dict[str, float]:
    """For each example, the share of System 2 among the NEIGHBOURS nearest other examples by these scores.

    It shows how much the surface of a question and the labels of the other examples tell together. Only the
    first MAX_COMPARED examples are compared.
    """
    import numpy as np

    ids = list(known_labels)[:MAX_COMPARED]
    table = np.array([[scores_of[id] for scores_of in scores.values()] for id in ids])  # (examples, scores)
    # Standardised, so that each score has the same weight in the distance; a constant score has none.
    table = (table - table.mean(0)) / np.where(table.std(0) > 0, table.std(0), 1)
    is_system2 = np.array([known_labels[id] == 2 for id in ids])
    shares = {}
    for i, id in enumerate(ids):
        distances = ((table - table[i]) ** 2).sum(1)  # (examples,)
        distances[i] = np.inf  # an example is not its own neighbour
        nearest = np.argsort(distances, kind="stable")[:NEIGHBOURS]
        shares[id] = float(is_system2[nearest].mean())
    return shares
