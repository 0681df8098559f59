"""The frontier of accuracy over tokens: what auto buys beside fast, slow and a random mixture of both."""

from collections.abc import Callable
from statistics import fmean

from stages.config import AUTO, FAST, SLOW
from stages.evaluation.metrics import answers_by_item
from stages.records import Sample
from stages.sweep.values import Value, accuracy, difference

Point = tuple[float, Value]
"""Mean tokens of an answer, and accuracy."""


def frontier(samples: dict[str, list[Sample]]) -> tuple[dict[str, Point], str]:
    """Compare the modes of one adapter on the items that all three answered; nothing if a mode is missing.

    samples: graded answers by mode. Returns the points of the modes, of the choice by an item's label, and of
    an oracle, which takes slow where fast is wrong and slow right; and what they say of auto.
    """
    if not {FAST, SLOW, AUTO} <= samples.keys():
        return {}, ""
    fast, slow, auto = (_of_items(samples[mode]) for mode in (FAST, SLOW, AUTO))
    names = [name for name in fast if name in slow and name in auto]
    systems = {sample.id: sample.system for sample in samples[FAST]}

    def point(choose: Callable[[str], tuple[float, float]]) -> Point:
        chosen = {name: choose(name) for name in names}
        return fmean(tokens for _, tokens in chosen.values()), accuracy(
            [{n: s for n, (s, _) in chosen.items()}]
        )

    points = {mode: point(of.__getitem__) for mode, of in ((FAST, fast), (AUTO, auto), (SLOW, slow))}
    if any(systems.values()):
        points["choice by label"] = point(lambda name: (slow if systems[name] == 2 else fast)[name])
    points["oracle"] = point(lambda name: slow[name] if slow[name][0] > fast[name][0] else fast[name])
    texts = []
    (fewest, _), (tokens, _), (most, _) = (points[mode] for mode in (FAST, AUTO, SLOW))
    if fewest < tokens <= most:
        share = (tokens - fewest) / (most - fewest)  # of slow, in a mixture that has as many tokens as auto
        mixed = {name: (1 - share) * fast[name][0] + share * slow[name][0] for name in names}
        above = difference([mixed], [{name: auto[name][0] for name in names}])
        texts.append(
            f"Auto minus a random mixture of fast and slow with as many tokens: {above.text()} points."
        )
    best, highest = (max(points[mode][1].mean for mode in modes) for modes in ((FAST, SLOW), ("oracle",)))
    gained, room = points[AUTO][1].mean - best, highest - best
    if gained < 0:
        texts.append(f"Auto is {-100 * gained:.1f} points below the better mode.")
    elif room > 0:
        texts.append(f"Auto has {100 * gained / room:.0f} % of what an oracle adds to the better mode.")
    return points, " ".join(texts)


def _of_items(samples: list[Sample]) -> dict[str, tuple[float, float]]:
    """Item → share of its answers that are correct, and their mean length in tokens."""
    return {
        item: (
            fmean(each.correct for each in answers),
            fmean(each.extra.get("tokens", 0) for each in answers),
        )
        for item, answers in answers_by_item(samples).items()
    }
