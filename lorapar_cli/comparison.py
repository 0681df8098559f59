"""Targets side by side: the graded answers of all evaluations of a run, compared item by item."""

from collections.abc import Iterator
from typing import Any

from stages.pipeline.plan import Step
from stages.pipeline.state import state
from stages.records import read_jsonl
from stages.store.artifacts import Store

Answers = dict[str, dict[str, dict[str, list[dict[str, Any]]]]]
"""Per target and group: the graded answers to each item."""


def tables(store: Store, steps: list[Step], by: str) -> dict[str, list[dict[str, Any]]]:
    """Per benchmark one row for each target and group; `by` is `system` or a field of the items."""
    found: dict[str, Answers] = {}
    for step in steps:
        target, _, benchmark = step.variant.partition("@")
        now = state(store, step)
        if now.state == "current" and now.artifact is not None:
            answers = found.setdefault(benchmark, {}).setdefault(target, {})
            for _, row in read_jsonl(now.artifact.path / "samples.jsonl"):
                value = row["system"] if by == "system" else row["extra"].get(by)
                for name in ("all", *([] if value is None else [f"{by} {value}" if by == "system" else str(value)])):
                    answers.setdefault(name, {}).setdefault(row["id"], []).append(row)
    return {benchmark: list(_compared(answers)) for benchmark, answers in found.items()}


def _compared(found: Answers) -> Iterator[dict[str, Any]]:
    """Accuracies with intervals, and the paired p-value against the target before where both answered the same items."""
    from stages.benchmarks.statistics import interval, paired_p

    groups = sorted({name for target in found.values() for name in target}, key=lambda name: (name != "all", name))
    against: str | None = None
    for target, answers in found.items():
        for group in groups:
            items = answers.get(group, {})
            if not items:
                continue
            graded = {item: rows for item, rows in items.items() if all(r["outcome"] != "refused" for r in rows)}
            shares = {item: _share(rows, "correct") for item, rows in graded.items()}
            flexible = [_share(rows, "correct_flexible") for rows in graded.values()]
            low, high = interval(list(shares.values())) if shares else (None, None)
            before = found[against].get(group, {}) if against else {}
            p = None
            if before.keys() == items.keys() and shares:
                both = [i for i in shares if all(r["outcome"] != "refused" for r in before[i])]
                p = paired_p([_share(before[i], "correct") for i in both], [shares[i] for i in both]) if both else None
            outcomes = [row["outcome"] for rows in items.values() for row in rows]
            yield {
                "target": target,
                "group": group,
                "n": len(shares),
                "accuracy": sum(shares.values()) / len(shares) if shares else None,
                "low": low,
                "high": high,
                "flexible": sum(flexible) / len(flexible) if flexible else None,
                **{name: outcomes.count(name) for name in ("correct", "wrong", "unparsed", "truncated", "refused")},
                "against": against,
                "p": p,
            }
        against = target


def _share(rows: list[dict[str, Any]], reading: str) -> float:
    return sum(row[reading] for row in rows) / len(rows)
