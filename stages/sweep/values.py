"""Values of a table: means over seeds with 95 % intervals over items and over seeds, and paired tests."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, replace

from stages.evaluation.statistics import (
    Interval,
    bootstrap,
    interval,
    over_replicates,
    paired_difference,
    paired_p,
)

ItemAccuracy = dict[str, float]
"""Item id → share of correct answers."""


@dataclass(frozen=True)
class Value:
    """A mean over seeds: accuracies and differences are shares of 1, other values are as they are."""

    mean: float
    of_seeds: list[float]
    """The mean of each seed, over all of its items; `mean` is over the items that all seeds have."""
    n: int | None = None
    """Number of items, of all seeds together if each has its own; None for values of summaries."""
    difference: bool = False
    """True for differences of two accuracies, whose intervals have p-values."""
    over_items: Interval | None = None
    """Over items, each averaged over seeds; None if there are several seeds, each with items of its own."""
    over_seeds: Interval | None = None
    """By Student's t over the means of the seeds; None for one seed, or if all means are equal."""
    bootstrap: Interval | None = None
    """Over seeds and the items of each; only if each seed has items of its own, and not all are alike."""


class NothingToShow(Exception):
    """All artifacts exist, but lack the value or have no item in common."""


def mean_of_numbers(of_seeds: list[float]) -> Value:
    """Average numbers of the steps' summaries over seeds."""
    spread = over_replicates(of_seeds)
    interval_over_seeds = spread and replace(spread, p=None)
    return Value(statistics.fmean(of_seeds), of_seeds, over_seeds=interval_over_seeds)


def accuracy(by_seed: list[ItemAccuracy], own_items: bool) -> Value:
    """Average the accuracies of each seed's items. Raises NothingToShow if there is no item."""
    if own_items:
        value = _over_replicates(by_seed)
        return replace(value, over_seeds=_within_bounds(value.over_seeds))
    items = mean_by_item(by_seed)
    if not items:
        raise NothingToShow
    of_seeds = [statistics.fmean(shares.values()) for shares in by_seed]
    return Value(
        statistics.fmean(items.values()),
        of_seeds,
        len(items),
        over_items=Interval(*interval(list(items.values()))),
        over_seeds=_within_bounds(over_replicates(of_seeds)),
    )


def _within_bounds(interval: Interval | None) -> Interval | None:
    """Limit the interval of an accuracy to [0, 1], and drop its p-value, which is of a mean of 0."""
    return interval and Interval(max(0.0, interval.low), min(1.0, interval.high))


def _over_replicates(by_seed: list[ItemAccuracy]) -> Value:
    """Average values of items over seeds that each have items of their own; all seeds weigh alike."""
    if not all(by_seed):
        raise NothingToShow
    replicates = [list(items.values()) for items in by_seed]
    means = [statistics.fmean(values) for values in replicates]
    number = sum(map(len, replicates))
    return Value(
        statistics.fmean(means),
        means,
        number,
        over_seeds=over_replicates(means),
        bootstrap=bootstrap(replicates),
    )


def difference(first: list[ItemAccuracy], second: list[ItemAccuracy], own_items: bool) -> Value:
    """Test `second` - `first`, both lists by seed, on the items that are graded in both.

    Without `own_items` these are the items that are graded in every seed. Each is averaged over seeds before
    the test over items, so n is their number. Raises NothingToShow if there is no such item.
    """
    if own_items:
        differences = [
            {item: b[item] - share for item, share in a.items() if item in b}
            for a, b in zip(first, second, strict=True)
        ]
        return replace(_over_replicates(differences), difference=True)
    first_means, second_means = mean_by_item(first), mean_by_item(second)
    common = [item for item in second_means if item in first_means]
    if not common:
        raise NothingToShow
    pairs = [first_means[item] for item in common], [second_means[item] for item in common]
    mean, low, high = paired_difference(*pairs)
    of_seeds = [_mean_difference(a, b) for a, b in zip(first, second, strict=True)]
    return Value(
        mean,
        of_seeds,
        len(common),
        difference=True,
        over_items=Interval(low, high, paired_p(*pairs)),
        over_seeds=over_replicates(of_seeds),
    )


def _mean_difference(first: ItemAccuracy, second: ItemAccuracy) -> float:
    """Return the mean of `second` - `first` over the items of both."""
    return statistics.fmean(second[item] - share for item, share in first.items() if item in second)


def mean_by_item(accuracies: list[ItemAccuracy]) -> ItemAccuracy:
    """Average each item over seeds, or over rows; only items that all of them have."""
    if not accuracies:
        return {}
    common = [item for item in accuracies[0] if all(item in each for each in accuracies)]
    return {item: statistics.fmean(each[item] for each in accuracies) for item in common}
