"""Where a voter's threshold lies, and whether it can tell the systems apart at all."""

from __future__ import annotations

from dataclasses import dataclass
from math import exp
from statistics import fmean, median

from stages.labelling.aggregate import log_odds
from stages.labelling.agreement import auc
from stages.labelling.personas import CalibrationExample

LEAST_EXAMPLES = 24
POOR_AUC = 0.65
POOR_MASS = 0.01
"""A constrained choice says little if the label words have less than this share of the probability."""


@dataclass(frozen=True)
class Calibration:
    method: str
    threshold: float
    auc: float | None
    """On the labelled examples."""
    interval: tuple[float, float] | None
    examples: int


def calibrate(
    method: str, judged: list[CalibrationExample], given: list[float | None], free: list[float | None]
) -> Calibration:
    """The threshold by `method`, and the AUC on the labelled examples.

    judged, given: labelled examples and the probability of System 2 for each. free: the same probability for
    questions without content. Method `held_out` takes the median of `given`. A median has no slope that could
    be fitted wrongly, but it is a fair threshold only for examples that are half System 1, half System 2.
    """
    pairs = [(value, row.system == 2) for row, value in zip(judged, given, strict=True) if value is not None]
    found = auc([value for value, _ in pairs], [two for _, two in pairs])
    threshold = 0.5
    if method == "held_out" and pairs:
        of_system = [[value for value, two in pairs if two is which] for which in (False, True)]
        equal = min(map(len, of_system))  # an unbalanced file must not move the median
        if equal:
            low, high = (_spread(values, equal) for values in of_system)
            threshold = median([*low, *high])
    elif method == "content_free" and (valid := [value for value in free if value is not None]):
        threshold = 1 / (1 + exp(-fmean(log_odds(value) for value in valid)))
    return Calibration(method, threshold, found and found[0], found and found[1], len(pairs))


def _spread(values: list[float], number: int) -> list[float]:
    """`number` of the values: the middles of as many equal parts of the sorted list."""
    ordered = sorted(values)
    return [ordered[(2 * i + 1) * len(ordered) // (2 * number)] for i in range(number)]
