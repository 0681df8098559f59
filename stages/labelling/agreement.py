"""The quality of labels: agreement between voters, with known labels, and with scores that need no model."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
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

NEAREST, MOST = 5, 2000


def auc(scores: Sequence[float], twos: Sequence[bool]) -> tuple[float, tuple[float, float]] | None:
    """Area under the ROC curve with its 95 % interval (Hanley and McNeil 1982); None with one class only.

    It is the probability that a System 2 item has a higher score than a System 1 item; a tie counts half.
    """
    from scipy.stats import rankdata

    ranks = rankdata(scores)
    high, low = sum(twos), len(twos) - sum(twos)
    if not high or not low:
        return None
    ranks_of_twos = sum(rank for rank, two in zip(ranks, twos, strict=True) if two)
    area = (ranks_of_twos - high * (high + 1) / 2) / (high * low)
    one, both = area / (2 - area), 2 * area**2 / (1 + area)
    error = area * (1 - area) + (high - 1) * (one - area**2) + (low - 1) * (both - area**2)
    half = Z * math.sqrt(max(error, 0.0) / (high * low))
    return float(area), (max(0.0, area - half), min(1.0, area + half))


def kappas(votes: dict[str, dict[str, int]]) -> dict[str, Any]:
    """Fleiss' kappa of all voters and Cohen's kappa of each pair, on the examples for which all voted.

    votes: for each voter, 1 or 2 per example id. Cohen's kappa has a 95 % interval where each of the two gave
    both votes: else it is 0 by definition. A kappa is None where all votes are equal, and it does not exist.
    """
    import numpy as np
    from statsmodels.stats.inter_rater import aggregate_raters, cohens_kappa, fleiss_kappa

    common = sorted(set.intersection(*(set(given) for given in votes.values())))
    if len(votes) < 2 or not common:
        return {}
    table = np.array([[given[id] for given in votes.values()] for id in common])  # (examples, voters)
    whole = None if len(np.unique(table)) < 2 else float(fleiss_kappa(aggregate_raters(table, n_cat=None)[0]))
    pairs = {}
    titles = list(votes)
    for a in range(len(titles)):
        for b in range(a + 1, len(titles)):
            counts = np.zeros((2, 2))
            np.add.at(counts, (table[:, a] - 1, table[:, b] - 1), 1)
            equal = float((table[:, a] == table[:, b]).mean())
            kappa = interval = None
            if all(len(np.unique(table[:, one])) > 1 for one in (a, b)):
                found = cohens_kappa(counts)
                kappa, interval = float(found.kappa), [float(found.kappa_low), float(found.kappa_upp)]
            elif len(np.unique(table[:, [a, b]])) > 1:
                kappa = 0.0
            pairs[f"{titles[a]} | {titles[b]}"] = {"equal": equal, "kappa": kappa, "interval": interval}
    return {"examples": len(common), "fleiss_kappa": whole, "pairs": pairs}


def with_known(
    known: dict[str, int], labels: dict[str, int | None], scores: dict[str, dict[str, float]]
) -> dict[str, Any]:
    """Agreement of labels with known ones (Wilson interval), and how well each score separates the latter.

    scores: for each voter, a number per example id that should be higher for System 2.
    """
    both = [(labels[id], system) for id, system in known.items() if labels.get(id)]
    equal = sum(a == b for a, b in both)
    table = {}
    for k in (1, 2):
        for j in (1, 2):
            table[f"known {k} labelled {j}"] = sum(a == j and b == k for a, b in both)
    areas = {}
    for title, given in scores.items():
        shared = [id for id in given if id in known]
        areas[title] = auc([given[id] for id in shared], [known[id] == 2 for id in shared])
    return {
        "n": len(both),
        "undecided": len(known) - len(both),
        "agreement": equal / len(both) if both else None,
        "interval": list(wilson(equal, len(both))) if both else None,
        **table,
        "auc": areas,
    }


def surface(examples: list[Example]) -> dict[str, dict[str, float]]:
    """Each score of SURFACE, per example id."""
    return {name: {e.id: float(read(e.prompt)) for e in examples} for name, read in SURFACE.items()}


def neighbours(scores: dict[str, dict[str, float]], known: dict[str, int]) -> dict[str, float]:
    """For each example, the share of System 2 among the NEAREST other examples by these scores.

    It shows what the surface of a question and the labels of the others tell together. Only the first MOST
    examples are compared, because every pair is.
    """
    import numpy as np

    ids = list(known)[:MOST]
    table = np.array([[given[id] for given in scores.values()] for id in ids])  # (examples, scores)
    table = (table - table.mean(0)) / np.where(table.std(0) > 0, table.std(0), 1)
    twos = np.array([known[id] == 2 for id in ids])
    found = {}
    for i, id in enumerate(ids):
        far = ((table - table[i]) ** 2).sum(1)
        far[i] = np.inf
        found[id] = float(twos[np.argsort(far, kind="stable")[:NEAREST]].mean())
    return found
