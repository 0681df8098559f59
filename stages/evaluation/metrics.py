"""From graded answers to metrics."""

from collections import Counter
from typing import Any

from stages.evaluation.statistics import interval, pass_at
from stages.records import OUTCOMES, Sample


def measured(samples: list[Sample], groups: tuple[str, ...]) -> dict[str, Any]:
    """Metrics of all samples, per system if there are labels, and per value of each field in `groups`."""
    found = {"all": figures(samples)}
    found |= {f"system{k}": figures(part) for k in (1, 2) if (part := [s for s in samples if s.system == k])}
    for name in groups:
        parts: dict[str, list[Sample]] = {}
        for sample in samples:
            parts.setdefault(str(sample.extra.get(name)), []).append(sample)
        of_parts = {value: figures(part) for value, part in sorted(parts.items())}
        rates = [part["accuracy"] for part in of_parts.values() if part["accuracy"] is not None]
        found["all"][f"macro_over_{name}"] = sum(rates) / len(rates) if rates else None
        found[f"by_{name}"] = of_parts
    return found


def brief(metrics: dict[str, Any]) -> dict[str, Any]:
    """The few metrics that are shown at the end of an evaluation."""
    whole = {name: value for name, value in metrics["all"].items() if value or name in ("n", "accuracy")}
    return {
        "all": whole,
        **{name: metrics[name]["accuracy"] for name in ("system1", "system2") if name in metrics},
    }


def figures(samples: list[Sample]) -> dict[str, Any]:
    """Accuracy by both readings with 95 % intervals over items, outcome counts, and pass@k where it exists.

    `n`, accuracies, intervals and pass@k count the items that `graded` keeps; outcomes count all answers, and
    `tokens` is their mean length. Choices have none.
    """
    outcomes = Counter(sample.outcome for sample in samples)
    items = graded(samples)
    result: dict[str, Any] = {"n": len(items), "answers": len(samples)}
    result |= {name: outcomes[name] for name in OUTCOMES}
    for name, reading in (("", "correct"), ("_flexible", "correct_flexible")):
        of_items = list(accuracy_by_item(items, reading).values())
        result[f"accuracy{name}"] = sum(of_items) / len(of_items) if of_items else None
        result[f"interval{name}"] = interval(of_items) if of_items else None
    written = [sample.extra["tokens"] for sample in samples if "tokens" in sample.extra]
    if written:
        result["tokens"] = sum(written) / len(written)
    counts = [(len(part), sum(s.correct for s in part)) for part in items.values()]
    fewest = min((n for n, _ in counts), default=1)
    for k in (1, 5, 10, 100):
        if fewest > 1 and k <= fewest:
            result[f"pass@{k}"] = sum(pass_at(k, n, c) for n, c in counts) / len(counts)
    return result


def graded(samples: list[Sample]) -> dict[str, list[Sample]]:
    """The answers to each item, without the items that have a refused answer: those count neither way.

    If only the refused answer were dropped, the item's other answers would stand for it, and pass@k would
    rest on too few.
    """
    items: dict[str, list[Sample]] = {}
    for sample in samples:
        items.setdefault(sample.id, []).append(sample)
    return {item: part for item, part in items.items() if all(s.outcome != "refused" for s in part)}


def accuracy_by_item(items: dict[str, list[Sample]], reading: str = "correct") -> dict[str, float]:
    """Each item's share of correct answers, by the strict reading or by `correct_flexible`."""
    return {item: sum(getattr(s, reading) for s in part) / len(part) for item, part in items.items()}
