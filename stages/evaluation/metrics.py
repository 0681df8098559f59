"""Metrics of graded answers."""

from collections import Counter
from typing import Any

from stages.evaluation.statistics import interval, pass_at
from stages.records import OUTCOMES, Sample


def compute_metrics(samples: list[Sample], groups: tuple[str, ...]) -> dict[str, Any]:
    """Metrics of all samples, per system if there are labels, and per value of each field in `groups`."""
    metrics = {"all": accuracy_metrics(samples)}
    for k in (1, 2):
        if of_system := [sample for sample in samples if sample.system == k]:
            metrics[f"system{k}"] = accuracy_metrics(of_system)
    for name in groups:
        by_value: dict[str, list[Sample]] = {}
        for sample in samples:
            by_value.setdefault(str(sample.extra.get(name)), []).append(sample)
        of_values = {value: accuracy_metrics(subset) for value, subset in sorted(by_value.items())}
        accuracies = [row["accuracy"] for row in of_values.values() if row["accuracy"] is not None]
        metrics["all"][f"macro_over_{name}"] = sum(accuracies) / len(accuracies) if accuracies else None
        metrics[f"by_{name}"] = of_values
    return metrics


def headline(metrics: dict[str, Any]) -> dict[str, Any]:
    """The few metrics that are shown at the end of an evaluation."""
    overall = {name: value for name, value in metrics["all"].items() if value or name in ("n", "accuracy")}
    return {
        "all": overall,
        **{name: metrics[name]["accuracy"] for name in ("system1", "system2") if name in metrics},
    }


def accuracy_metrics(samples: list[Sample]) -> dict[str, Any]:
    """Accuracy by both readings with 95 % intervals over items, outcome counts, and pass@k where it exists.

    `n`, accuracies, intervals and pass@k count the items that `graded` keeps; outcomes count all answers, and
    `tokens` is their mean length. Choices have no length. `thought_tokens` is the part that is a thought.
    """
    outcomes = Counter(sample.outcome for sample in samples)
    items = answers_by_item(samples)
    result: dict[str, Any] = {"n": len(items), "answers": len(samples)}
    result |= {name: outcomes[name] for name in OUTCOMES}
    for suffix, reading in (("", "correct"), ("_flexible", "correct_flexible")):
        accuracies = list(accuracy_by_item(items, reading).values())
        result[f"accuracy{suffix}"] = sum(accuracies) / len(accuracies) if accuracies else None
        result[f"interval{suffix}"] = interval(accuracies) if accuracies else None
    for name in ("tokens", "thought_tokens"):
        if lengths := [sample.extra[name] for sample in samples if name in sample.extra]:
            result[name] = sum(lengths) / len(lengths)
    counts = [(len(answers), sum(s.correct for s in answers)) for answers in items.values()]
    # pass@k exists only if every item has at least k answers; of single answers it is the accuracy.
    fewest = min((n for n, _ in counts), default=1)
    for k in (1, 5, 10, 100):
        if fewest > 1 and k <= fewest:
            result[f"pass@{k}"] = sum(pass_at(k, n, c) for n, c in counts) / len(counts)
    return result


def answers_by_item(samples: list[Sample]) -> dict[str, list[Sample]]:
    """The answers to each item, without the items that have a refused answer: those count neither way.

    If only the refused answer were dropped, the item's other answers would stand for it, and pass@k would
    rest on too few.
    """
    items: dict[str, list[Sample]] = {}
    for sample in samples:
        items.setdefault(sample.id, []).append(sample)
    return {item: answers for item, answers in items.items() if all(s.outcome != "refused" for s in answers)}


def accuracy_by_item(items: dict[str, list[Sample]], reading: str = "correct") -> dict[str, float]:
    """Each item's share of correct answers, by the strict reading or by `correct_flexible`."""
    return {item: sum(getattr(s, reading) for s in answers) / len(answers) for item, answers in items.items()}
