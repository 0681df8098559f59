"""How votes become a label: thresholds, rules, ties and quorum."""

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
    """What one voter said."""

    given: Mapping[str, float | None]
    """Probability of System 2 per example id; None where the voter gave no valid answer."""
    threshold: float = 0.5
    weight: float = 1.0

    def calibrated(self, id: str) -> float | None:
        """The probability, shifted in log-odds so that the threshold becomes 0.5."""
        value = self.given[id]
        return None if value is None else 1 / (1 + math.exp(log_odds(self.threshold) - log_odds(value)))

    def at_share(self, share: float) -> tuple[VoterResult, set[str]]:
        """The voice with the threshold that `share` of the valid examples reach, and those; ties go by id."""
        valid = {id: value for id, value in self.given.items() if value is not None}
        above = sorted(valid, key=lambda id: (-valid[id], id))[: round(share * len(valid))]
        threshold = min((valid[id] for id in above), default=1.0)
        return VoterResult(self.given, threshold, self.weight), set(above)

    def above(self) -> set[str]:
        """The examples for which it votes 2."""
        return {id for id, value in self.given.items() if value is not None and value > self.threshold}


def log_odds(probability: float) -> float:
    inside = min(max(probability, EDGE), 1 - EDGE)
    return math.log(inside / (1 - inside))


def aggregate(
    examples: list[Example], voices: Mapping[str, VoterResult], section: ClassifySection
) -> tuple[list[Labelled], dict[str, VoterResult], dict[str, set[str]]]:
    """Labels by `section.rule`, the voices with the thresholds used, and per voter the examples it votes 2.

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
    held, twos = {}, {}
    for title, voice in voices.items():
        share = section.system2_share
        held[title], twos[title] = (voice, voice.above()) if share is None else voice.at_share(share)
    rows = []
    for example in examples:
        votes = {title: voice.calibrated(example.id) for title, voice in held.items()}
        said = [
            (value, example.id in twos[title], held[title].weight if section.rule == "weighted" else 1.0)
            for title, value in votes.items()
            if value is not None
        ]
        enough = bool(said) and len(said) >= section.quorum * len(votes)
        shown = {title: rounded(value) for title, value in votes.items()}
        rows.append(Labelled(example, _label(said, section) if enough else None, shown))
    return rows, held, twos


def _label(said: list[tuple[float, bool, float]], section: ClassifySection) -> int | None:
    """The label from (probability, whether it votes 2, weight) of the valid voters."""
    total = sum(weight for _, _, weight in said)
    two = sum(weight for _, votes_two, weight in said if votes_two) / total
    mean = sum(value * weight for value, _, weight in said) / total
    if max(two, 1 - two) < section.min_agreement - 1e-9:
        return None
    if section.rule == "unanimous":
        return {0.0: 1, 1.0: 2}.get(two)
    if section.rule == "mean_probability" and abs(mean - 0.5) > 1e-9:
        return 2 if mean > 0.5 else 1
    if abs(two - 0.5) < 1e-9:
        return 2 if mean >= 0.5 - 1e-9 else 1
    return 2 if two > 0.5 else 1


def rounded(value: float | None) -> float | None:
    """A probability to six digits: further ones depend on what else was in its batch."""
    return None if value is None else round(value, 6)
