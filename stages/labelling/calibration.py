"""Calibration of a voter: its threshold, and whether it can tell the systems apart at all."""

from __future__ import annotations

from dataclasses import dataclass
from math import exp
from statistics import fmean, median

from stages.labelling.aggregate import log_odds
from stages.labelling.agreement import auc
from stages.labelling.personas import CalibrationExample

MIN_EXAMPLES = 24
"""Calibration by labelled examples needs at least this many."""
POOR_AUC = 0.65
"""A voter with a lower AUC on the labelled examples is warned about."""
POOR_MASS = 0.01
"""A constrained choice says little if the label words have less than this share of the probability."""


@dataclass(frozen=True)
class Calibration:
    """A voter's threshold, and how well its probabilities separate the labelled examples."""

    method: str
    threshold: float
    auc: float | None
    """On the labelled examples."""
    interval: tuple[float, float] | None
    """95 % interval of the AUC."""
    examples: int
    """Labelled examples with a valid vote."""


def calibrate(
    method: str,
    labelled: list[CalibrationExample],
    votes: list[float | None],
    content_free_votes: list[float | None],
) -> Calibration:
    """Find the threshold by `method`, and the AUC on the labelled examples.

    votes: the probability of System 2 for each labelled example. content_free_votes: the same for questions
    without content. Method `held_out` takes the median of `votes`. A median has no slope that could be fitted
    wrongly, but it is a fair threshold only for examples that are half System 1, half System 2.
    """
    pairs = [(vote, row.system == 2) for row, vote in zip(labelled, votes, strict=True) if vote is not None]
    area = auc([vote for vote, _ in pairs], [is_system2 for _, is_system2 in pairs])
    threshold = 0.5
    if method == "held_out" and pairs:
        of_system1 = [vote for vote, is_system2 in pairs if not is_system2]
        of_system2 = [vote for vote, is_system2 in pairs if is_system2]
        # An unbalanced file must not move the median: the same number of votes represents each system.
        if number := min(len(of_system1), len(of_system2)):
            threshold = median([*_representatives(of_system1, number), *_representatives(of_system2, number)])
    elif method == "content_free" and (valid := [vote for vote in content_free_votes if vote is not None]):
        threshold = 1 / (1 + exp(-fmean(log_odds(vote) for vote in valid)))  # sigmoid of the mean log-odds
    return Calibration(method, threshold, area and area[0], area and area[1], len(pairs))


def _representatives(values: list[float], number: int) -> list[float]:
    """`number` of the values that represent their distribution: the quantiles (i + 1/2) / number.

    Quantile q is the value at the 0-based rank floor(q · n): the middle of the i-th of `number` equal pieces
    of the sorted list. All values, if `number` is n.
    """
    # In integers, because no method of `numpy.quantile` gives these ranks. The closest, `inverted_cdf`, takes
    # the preceding value where q · n is a whole number, as at q = 1/2 of 4 values.
    ordered = sorted(values)
    return [ordered[(2 * i + 1) * len(ordered) // (2 * number)] for i in range(number)]
