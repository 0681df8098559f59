"""Values of a table: means with 95 % intervals over items and over seeds, and paired tests."""

import statistics
from dataclasses import dataclass, field

from stages.evaluation.statistics import (
    Interval,
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

    def text(self) -> str:
        """Write the mean, its interval over items and p, and in another line those over seeds.

        `27.1 [24.0, 30.4]`; differences have signs: `+2.0 [-1.0, +5.0], p = .2`.
        """
        lines = [f"{self.number(self.mean)} {self.ends(self.over_items)}".strip()]
        lines += [f"seeds {self.ends(self.over_seeds)}"] if self.over_seeds else []
        return "\n".join(lines)

    def ends(self, interval: Interval | None) -> str:
        """Write an interval of this value and its p-value; "" without one."""
        if interval is None:
            return ""
        ends = f"[{self.number(interval.low, 3)}, {self.number(interval.high, 3)}]"
        return ends if interval.p is None else f"{ends}, {p_value(interval.p)}"

    def number(self, number: float, digits: int = 4) -> str:
        """Write an accuracy in %, a difference in points, others in significant digits or as integers."""
        if self.n is None:
            return f"{number:.0f}" if abs(number) >= 1000 else f"{number:.{digits}g}"
        return f"{100 * number:{'+' if self.difference else ''}z.1f}"


class NothingToShow(Exception):
    """All artifacts exist, but lack the value or have no item in common."""


def accuracy(by_seed: list[ItemAccuracy], own_items: bool = False) -> Value:
    """Average the accuracies of each seed's items. Raises NothingToShow if there is no item.

    own_items: each seed has items of its own; all seeds weigh alike, and the items have no interval.
    """
    items = _of_items(by_seed, own_items)
    of_seeds = [statistics.fmean(shares.values()) for shares in by_seed]
    seeds = over_replicates(of_seeds)  # its p-value is of a mean of 0, and it may leave [0, 1]
    seeds = seeds and Interval(max(0.0, seeds.low), min(1.0, seeds.high))
    if own_items:
        return Value(statistics.fmean(of_seeds), of_seeds, len(items), over_seeds=seeds)
    return Value(statistics.fmean(items), of_seeds, len(items), False, Interval(*interval(items)), seeds)


def difference(first: list[ItemAccuracy], second: list[ItemAccuracy], own_items: bool = False) -> Value:
    """Test `second` - `first`, both lists by seed, on the items that are graded in both.

    Without `own_items` these are the items that are graded in every seed. Each is averaged over seeds before
    the test over items, so n is their number. Raises NothingToShow if there is no such item.
    """
    by_seed = [
        {item: b[item] - share for item, share in a.items() if item in b}
        for a, b in zip(first, second, strict=True)
    ]
    items = _of_items(by_seed, own_items)
    of_seeds = [statistics.fmean(differences.values()) for differences in by_seed]
    seeds = over_replicates(of_seeds)
    if own_items:
        return Value(statistics.fmean(of_seeds), of_seeds, len(items), True, over_seeds=seeds)
    unchanged = [0.0] * len(items)
    mean, low, high = paired_difference(unchanged, items)
    return Value(mean, of_seeds, len(items), True, Interval(low, high, paired_p(unchanged, items)), seeds)


def _of_items(by_seed: list[ItemAccuracy], own_items: bool) -> list[float]:
    """Average each item that all seeds have over seeds; if each has its own, list them all."""
    if not by_seed or not all(by_seed):
        raise NothingToShow
    if own_items:
        return [value for items in by_seed for value in items.values()]
    common = [item for item in by_seed[0] if all(item in items for items in by_seed)]
    if not common:
        raise NothingToShow
    return [statistics.fmean(items[item] for items in by_seed) for item in common]
