"""The quality of labels: agreement between voters, with labels from elsewhere, and with what needs no model at all."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

from stages.benchmarks.statistics import wilson
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
"""What tells long from short and form from form without reading: a voter that does no better has read nothing."""


NEAREST, MOST = 5, 2000


def auc(scores: Sequence[float], twos: Sequence[bool]) -> tuple[float, tuple[float, float]] | None:
    """Probability that a System 2 item has the higher score, ties half, with its 95 % interval; None with one class only.

    Interval: Hanley and McNeil 1982.
    """
    from scipy.stats import rankdata

    ranks = rankdata(scores)
    high, low = sum(twos), len(twos) - sum(twos)
    if not high or not low:
        return None
    area = (sum(rank for rank, two in zip(ranks, twos, strict=True) if two) - high * (high + 1) / 2) / (
        high * low
    )
    one, both = area / (2 - area), 2 * area**2 / (1 + area)
    error = area * (1 - area) + (high - 1) * (one - area**2) + (low - 1) * (both - area**2)
    half = 1.96 * math.sqrt(max(error, 0.0) / (high * low))
    return float(area), (max(0.0, area - half), min(1.0, area + half))


def kappas(votes: dict[str, dict[str, int]]) -> dict[str, Any]:
    """Fleiss' kappa over all voters and Cohen's of each pair with its 95 % interval, on the examples where all voted.

    votes: per voter, per example id, 1 or 2. Kappa is None where it does not exist: all votes equal.
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
            if len(np.unique(table[:, [a, b]])) > 1:
                found = cohens_kappa(counts)
                kappa, interval = float(found.kappa), [float(found.kappa_low), float(found.kappa_upp)]
            pairs[f"{titles[a]} | {titles[b]}"] = {"equal": equal, "kappa": kappa, "interval": interval}
    return {"examples": len(common), "fleiss_kappa": whole, "pairs": pairs}


def with_known(
    known: dict[str, int], labels: dict[str, int | None], scores: dict[str, dict[str, float]]
) -> dict[str, Any]:
    """Agreement of labels with those known from elsewhere (Wilson interval), and how well each score separates them.

    scores: per voter, per example id, any number that should be higher for System 2.
    """
    both = [(labels[id], system) for id, system in known.items() if labels.get(id)]
    equal = sum(a == b for a, b in both)
    table = {
        f"known {k} labelled {j}": sum(a == j and b == k for a, b in both) for k in (1, 2) for j in (1, 2)
    }
    return {
        "n": len(both),
        "undecided": len(known) - len(both),
        "agreement": equal / len(both) if both else None,
        "interval": list(wilson(equal, len(both))) if both else None,
        **table,
        "auc": {
            title: auc(
                [given[id] for id in given if id in known], [known[id] == 2 for id in given if id in known]
            )
            for title, given in scores.items()
        },
    }


def surface(examples: list[Example]) -> dict[str, dict[str, float]]:
    """The scores of SURFACE per example id."""
    return {name: {e.id: float(read(e.prompt)) for e in examples} for name, read in SURFACE.items()}


def neighbours(scores: dict[str, dict[str, float]], known: dict[str, int]) -> dict[str, float]:
    """Share of System 2 among the NEAREST other examples by these scores: what surface and others' labels tell together.

    For the first MOST examples; each pair is looked at.
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
