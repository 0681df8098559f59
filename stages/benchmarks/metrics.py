"""From graded answers to metrics."""

from collections import Counter
from typing import Any

from stages.benchmarks.statistics import interval, pass_at
from stages.records import OUTCOMES, Sample


def measured(samples: list[Sample], groups: tuple[str, ...]) -> dict[str, Any]:
    """Metrics of all samples, per system where labels exist, and per value of each of the fields `groups`."""
    found = {"all": _metrics(samples)}
    found |= {f"system{k}": _metrics(part) for k in (1, 2) if (part := [s for s in samples if s.system == k])}
    for name in groups:
        parts: dict[str, list[Sample]] = {}
        for sample in samples:
            parts.setdefault(str(sample.extra.get(name)), []).append(sample)
        of_parts = {value: _metrics(part) for value, part in sorted(parts.items())}
        rates = [part["accuracy"] for part in of_parts.values() if part["accuracy"] is not None]
        found["all"][f"macro_over_{name}"] = sum(rates) / len(rates) if rates else None
        found[f"by_{name}"] = of_parts
    return found


def brief(metrics: dict[str, Any]) -> dict[str, Any]:
    """What of the metrics a person sees at once."""
    whole = {name: value for name, value in metrics["all"].items() if value or name in ("n", "accuracy")}
    return {"all": whole, **{name: metrics[name]["accuracy"] for name in ("system1", "system2") if name in metrics}}


def _metrics(samples: list[Sample]) -> dict[str, Any]:
    """Accuracy by strict and by flexible reading with 95 % intervals over items, outcomes, and pass@k of several answers.

    Answers that could not be graded count neither way.
    """
    outcomes = Counter(sample.outcome for sample in samples)
    items: dict[str, list[Sample]] = {}
    for sample in samples:
        if sample.outcome != "refused":
            items.setdefault(sample.id, []).append(sample)
    result: dict[str, Any] = {"n": len(items), "answers": len(samples), **{name: outcomes[name] for name in OUTCOMES}}
    for name, reading in (("", "correct"), ("_flexible", "correct_flexible")):
        shares = [sum(getattr(s, reading) for s in part) / len(part) for part in items.values()]
        result[f"accuracy{name}"] = sum(shares) / len(shares) if shares else None
        result[f"interval{name}"] = interval(shares) if shares else None
    counts = [(len(part), sum(s.correct for s in part)) for part in items.values()]
    fewest = min((n for n, _ in counts), default=1)
    for k in (k for k in (1, 5, 10, 100) if fewest > 1 and k <= fewest):
        result[f"pass@{k}"] = sum(pass_at(k, n, c) for n, c in counts) / len(counts)
    return result
