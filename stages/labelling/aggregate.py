"""From votes to labels: the threshold of each voter, then rules, ties and quorum."""

from collections.abc import Mapping, Set
from dataclasses import dataclass, replace
from math import exp, log, sqrt
from statistics import median
from typing import Self

from stages.config import ClassifySection
from stages.evaluation.statistics import Z
from stages.records import Example, Labelled

EDGE = 1e-6
"""Probabilities of 0 and 1 are moved inwards by this much, so that their log-odds exist."""
MIN_EXAMPLES = 24
"""Calibration by labelled examples needs at least this many."""


@dataclass(frozen=True)
class Calibration:
    """A voter's threshold, and how well its probabilities separate the labelled examples."""

    threshold: float
    auc: float | None
    """On the labelled examples."""
    interval: tuple[float, float] | None
    """95 % interval of the AUC."""
    examples: int
    """Labelled examples with a valid vote."""


def calibrate(labelled: list[Labelled], votes: list[float | None], by_median: bool) -> Calibration:
    """Find the threshold, and the AUC on the labelled examples.

    votes: the probability of System 2 for each labelled example. by_median: their median is the threshold, in
    place of a half. It has no slope that could be fitted wrongly.
    """
    pairs = [(vote, row.system) for row, vote in zip(labelled, votes, strict=True) if vote is not None]
    of_system1, of_system2 = ([vote for vote, system in pairs if system == which] for which in (1, 2))
    area, interval = auc(of_system1, of_system2) or (None, None)
    # An unbalanced file must not move the median: so repeated, both systems have the same number of votes.
    balanced = of_system1 * len(of_system2) + of_system2 * len(of_system1)
    threshold = median(balanced) if by_median and balanced else 0.5
    return Calibration(threshold, area, interval, len(pairs))


def auc(of_system1: list[float], of_system2: list[float]) -> tuple[float, tuple[float, float]] | None:
    """Area under the ROC curve with its 95 % interval (Hanley and McNeil 1982); None if one list is empty.

    It is the probability that a System 2 item has a higher score than a System 1 item; a tie counts half.
    """
    from scipy.stats import mannwhitneyu

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
    margin = Z * sqrt(max(variance, 0.0) / (n2 * n1))
    return area, (max(0.0, area - margin), min(1.0, area + margin))


@dataclass(frozen=True)
class VoterResult:
    """The probabilities that one voter gave, with its threshold."""

    probabilities: Mapping[str, float | None]
    """Probability of System 2 per example id; None where the voter gave no valid answer."""
    threshold: float = 0.5
    system2_ids: Set[str] = frozenset()
    """The ids of the examples for which it votes 2, once `decided`."""

    @property
    def valid(self) -> dict[str, float]:
        return {id: value for id, value in self.probabilities.items() if value is not None}

    def calibrated(self, id: str) -> float | None:
        """The probability, shifted in log-odds so that the threshold becomes 0.5."""
        value = self.probabilities[id]
        if value is None:
            return None
        value, threshold = (min(max(p, EDGE), 1 - EDGE) for p in (value, self.threshold))
        # sigmoid(log_odds(value) - log_odds(threshold))
        return 1 / (1 + exp(log(threshold / (1 - threshold)) - log(value / (1 - value))))

    def decided(self, share: float | None) -> Self:
        """Vote 2 above the threshold; or, if the share of System 2 is known, for that share of the examples.

        Those are the valid ones with the highest probability, ties by id; the lowest is the threshold then.
        """
        valid = self.valid
        if share is None:
            return replace(self, system2_ids={id for id, value in valid.items() if value > self.threshold})
        highest = sorted(valid, key=lambda id: (-valid[id], id))[: round(share * len(valid))]
        threshold = min((valid[id] for id in highest), default=1.0)
        return replace(self, threshold=threshold, system2_ids=set(highest))


def aggregate(
    examples: list[Example], voters: Mapping[str, VoterResult], section: ClassifySection
) -> list[Labelled]:
    """Decide the labels by the majority of `decided` results by voter.

    Voters without a valid answer for an example are left out. The example is undecided (None) if the share of
    valid voters is below `quorum`, or that of the larger side among them below `min_agreement`. A tie is
    decided by the mean calibrated probability, and if that is 0.5 too, for 2.
    """
    rows = []
    for example in examples:
        votes = {title: result.calibrated(example.id) for title, result in voters.items()}
        valid = {title: value for title, value in votes.items() if value is not None}
        system = None
        if valid and len(valid) >= section.quorum * len(votes):
            share_of_2 = sum(example.id in voters[title].system2_ids for title in valid) / len(valid)
            # The margins of 1e-9 make shares and means that differ by rounding alone count as equal.
            if max(share_of_2, 1 - share_of_2) >= section.min_agreement - 1e-9:
                is_tie = abs(share_of_2 - 0.5) < 1e-9
                decisive = sum(valid.values()) / len(valid) + 1e-9 if is_tie else share_of_2
                system = 2 if decisive >= 0.5 else 1
        rows.append(Labelled(example, system, {title: rounded(value) for title, value in votes.items()}))
    return rows


def rounded(value: float | None) -> float | None:
    """Round a probability to six digits: further ones depend on what else was in its batch."""
    return None if value is None else round(value, 6)
