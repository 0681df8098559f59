"""Aggregation of votes into labels: thresholds, rules, ties and quorum."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from stages.config import ClassifySection
from stages.records import Example, Labelled

EDGE = 1e-6
"""Probabilities of 0 and 1 are moved inwards by this much, so that their log-odds exist."""


@dataclass(frozen=True)
class VoterResult:
    """The probabilities that one voter gave, with its threshold and weight."""

    probabilities: Mapping[str, float | None]
    """Probability of System 2 per example id; None where the voter gave no valid answer."""
    threshold: float = 0.5
    weight: float = 1.0

    def valid(self) -> dict[str, float]:
        """The probabilities of the valid answers."""
        return {id: value for id, value in self.probabilities.items() if value is not None}

    def calibrated(self, id: str) -> float | None:
        """The probability, shifted in log-odds so that the threshold becomes 0.5."""
        value = self.probabilities[id]
        # sigmoid(log_odds(value) - log_odds(threshold))
        return None if value is None else 1 / (1 + math.exp(log_odds(self.threshold) - log_odds(value)))

    def at_share(self, share: float) -> tuple[VoterResult, set[str]]:
        """Vote 2 for this share of the valid examples, those with the highest probability; ties go by id.

        Returns the result with the lowest of their probabilities as threshold, and the ids of the examples.
        """
        valid = self.valid()
        system2_ids = sorted(valid, key=lambda id: (-valid[id], id))[: round(share * len(valid))]
        threshold = min((valid[id] for id in system2_ids), default=1.0)
        return VoterResult(self.probabilities, threshold, self.weight), set(system2_ids)

    def above_threshold(self) -> set[str]:
        """The ids of the examples for which it votes 2."""
        return {id for id, value in self.valid().items() if value > self.threshold}


def log_odds(probability: float) -> float:
    """log(p / (1 - p)), finite at 0 and 1."""
    inside = min(max(probability, EDGE), 1 - EDGE)
    return math.log(inside / (1 - inside))


def aggregate(
    examples: list[Example], voter_results: Mapping[str, VoterResult], section: ClassifySection
) -> tuple[list[Labelled], dict[str, VoterResult], dict[str, set[str]]]:
    """Decide the labels by `section.rule`.

    Returns the labelled rows; per voter its result with the threshold used; per voter the ids it votes 2 for.

    - A voter votes 2 above its threshold. Where the share of System 2 is known, it instead votes 2 for that
      share of the examples, those with the highest probability of System 2.
    - Voters without a valid answer for an example are left out. If the share of valid voters is below
      `quorum`, the example is undecided (None).
    - Rules majority and weighted: the side with more voters, or more weight. A tie is decided by the mean
      calibrated probability, and if that is 0.5 too, for 2.
    - Rule mean_probability: 2 if the mean is above 0.5; if it is 0.5, the side with more voters. Rule
      unanimous: undecided unless all agree.
    - If the larger side has less than `min_agreement` of the voters (or weight), the example is undecided.
    """
    with_thresholds: dict[str, VoterResult] = {}
    system2_ids: dict[str, set[str]] = {}
    for title, result in voter_results.items():
        if section.system2_share is None:
            with_thresholds[title], system2_ids[title] = result, result.above_threshold()
        else:
            with_thresholds[title], system2_ids[title] = result.at_share(section.system2_share)
    rows = []
    for example in examples:
        votes = {title: result.calibrated(example.id) for title, result in with_thresholds.items()}
        valid_votes = [
            (
                value,
                example.id in system2_ids[title],
                with_thresholds[title].weight if section.rule == "weighted" else 1.0,
            )
            for title, value in votes.items()
            if value is not None
        ]
        quorate = bool(valid_votes) and len(valid_votes) >= section.quorum * len(votes)
        rounded_votes = {title: rounded(value) for title, value in votes.items()}
        rows.append(Labelled(example, _label(valid_votes, section) if quorate else None, rounded_votes))
    return rows, with_thresholds, system2_ids


def _label(valid_votes: list[tuple[float, bool, float]], section: ClassifySection) -> int | None:
    """The label from (probability, whether it votes 2, weight) of the valid voters; see `aggregate`."""
    total = sum(weight for _, _, weight in valid_votes)
    share_of_2 = sum(weight for _, votes_2, weight in valid_votes if votes_2) / total
    mean = sum(value * weight for value, _, weight in valid_votes) / total
    # The margins of 1e-9 make shares and means that differ by rounding alone count as equal.
    if max(share_of_2, 1 - share_of_2) < section.min_agreement - 1e-9:
        return None
    if section.rule == "unanimous":
        return {0.0: 1, 1.0: 2}.get(share_of_2)
    if section.rule == "mean_probability" and abs(mean - 0.5) > 1e-9:
        return 2 if mean > 0.5 else 1
    if abs(share_of_2 - 0.5) < 1e-9:
        return 2 if mean >= 0.5 - 1e-9 else 1
    return 2 if share_of_2 > 0.5 else 1


def rounded(value: float | None) -> float | None:
    """Round a probability to six digits: further ones depend on what else was in its batch."""
    return None if value is None else round(value, 6)
