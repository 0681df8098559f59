"""Values of a table: means with 95 % intervals over items and over seeds, and paired tests."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field, replace

from stages.evaluation.statistics import (
    Interval,
    bootstrap,
    interval,
    over_replicates,
    p_value,
    paired_difference,
    paired_p,
)

ItemAccuracy = dict[str, float]
"""Item id → share of correct answers."""


@dataclass(frozen=True)
class Value:
    """A mean over seeds: accuracies and differences are shares of 1, other values are as they are."""

    mean: float
    of_seeds: list[float] = field(default_factory=list)
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

    @property
    def interval(self) -> Interval | None:
        """The interval that figures draw."""
        return self.over_items or self.over_seeds

    def text(self, to: str = ", ", before_p: str = ", ") -> str:
        """Write the mean, its interval over items and p: `27.1 [24.0, 30.4], p = .04`.

        Differences have signs: `+2.0 [-1.0, +5.0], p = .2`. to: separates the ends of the interval.
        """
        text = f"{self.number(self.mean)} {self.ends(self.over_items, to)}".strip()
        p = self.over_items.p if self.over_items else None
        return text if p is None else f"{text}{before_p}{p_value(p)}"

    def ends(self, interval: Interval | None, to: str = ", ") -> str:
        """Write the ends of an interval of this value; "" without one."""
        return f"[{self.number(interval.low, 3)}{to}{self.number(interval.high, 3)}]" if interval else ""

    def number(self, number: float, digits: int = 4) -> str:
        """Write an accuracy in %, a difference in points, others in significant digits or as integers."""
        if self.n is None:
            return f"{number:.0f}" if abs(number) >= 1000 else f"{number:.{digits}g}"
        return f"{100 * number:{'+' if self.difference else ''}z.1f}"


class NothingToShow(Exception):
    """All artifacts exist, but lack the value or have no item in common."""


def mean_of_numbers(of_seeds: list[float]) -> Value:
    """Average numbers of the steps' summaries over seeds."""
    spread = over_replicates(of_seeds)
    return Value(statistics.fmean(of_seeds), of_seeds, over_seeds=spread and replace(spread, p=None))


def accuracy(by_seed: list[ItemAccuracy], own_items: bool) -> Value:
    """Average the accuracies of each seed's items. Raises NothingToShow if there is no item."""
    if own_items:
        value = _over_replicates(by_seed)
    else:
        items = mean_by_item(by_seed)
        if not items:
            raise NothingToShow
        of_seeds = [statistics.fmean(shares.values()) for shares in by_seed]
        over_items = Interval(*interval(list(items.values())))
        mean = statistics.fmean(items.values())
        value = Value(mean, of_seeds, len(items), False, over_items, over_replicates(of_seeds))
    seeds = value.over_seeds  # its p-value is of a mean of 0, and it may leave [0, 1]
    return replace(value, over_seeds=seeds and Interval(max(0.0, seeds.low), min(1.0, seeds.high)))


def _over_replicates(by_seed: list[ItemAccuracy]) -> Value:
    """Average values of items over seeds that each have items of their own; all seeds weigh alike."""
    if not all(by_seed):
        raise NothingToShow
    replicates = [list(items.values()) for items in by_seed]
    means = [statistics.fmean(values) for values in replicates]
    return Value(
        statistics.fmean(means),
        means,
        sum(map(len, replicates)),
        over_seeds=over_replicates(means),
        bootstrap=bootstrap(replicates),
    )


def difference(first: list[ItemAccuracy], second: list[ItemAccuracy], own_items: bool) -> Value:
    """Test `second` - `first`, both lists by seed, on the items that are graded in both.

    Without `own_items` these are the items that are graded in every seed. Each is averaged over seeds before
    the test over items, so n is their number. Raises NothingToShow if there is no such item.
    """
    by_seed = [
        {item: b[item] - share for item, share in a.items() if item in b}
        for a, b in zip(first, second, strict=True)
    ]
    if own_items:
        return replace(_over_replicates(by_seed), difference=True)
    first_means, second_means = mean_by_item(first), mean_by_item(second)
    common = [item for item in second_means if item in first_means]
    if not common:
        raise NothingToShow
    pairs = [first_means[item] for item in common], [second_means[item] for item in common]
    mean, low, high = paired_difference(*pairs)
    of_seeds = [statistics.fmean(differences.values()) for differences in by_seed]
    over_items = Interval(low, high, paired_p(*pairs))
    return Value(mean, of_seeds, len(common), True, over_items, over_replicates(of_seeds))


def mean_by_item(accuracies: list[ItemAccuracy]) -> ItemAccuracy:
    """Average each item over seeds, or over rows; only items that all of them have."""
    if not accuracies:
        return {}
    common = [item for item in accuracies[0] if all(item in each for each in accuracies)]
    return {item: statistics.fmean(each[item] for each in accuracies) for item in common}
