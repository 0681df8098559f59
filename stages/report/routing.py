"""The part of a run's page on routing: what `auto` costs and keeps beside one mode for all items."""

from __future__ import annotations

import json

from stages.config import ROUTED
from stages.evaluation.statistics import Interval
from stages.report.page import Block, Grid, Text
from stages.store.artifacts import Artifact
from stages.sweep.values import Value

CAPTION = (
    "fast and slow: one mode for all items. auto: one vote of the base on each item decides. "
    "oracle: the better mode for each item, and of equals the shorter answer; no router can do better with "
    "these answers."
)


def blocks(artifacts: dict[str, Artifact]) -> list[Block]:
    """Tabulate the routings of each benchmark that has target auto; artifacts: the current ones by step."""
    content: list[Block] = []
    for name, artifact in artifacts.items():
        target, _, benchmark = name.removeprefix("eval:").partition("@")
        if target != ROUTED:
            continue
        metrics = json.loads((artifact.path / "metrics.json").read_text(encoding="utf-8"))
        rows = [
            [
                title,
                Value(row["accuracy"], n=row["n"], over_items=Interval(*row["interval"])).text(),
                f"{row['tokens']:.1f}" if "tokens" in row else "–",
                f"{100 * row['slow_share']:.0f} %",
            ]
            for title, row in metrics["routing"].items()
            if row["accuracy"] is not None
        ]
        head = [benchmark, "accuracy, % [95 % interval]", "tokens of an answer", "answered slowly"]
        content.append(Grid(head, rows, CAPTION))
        content.append(Text(_router(metrics["router"]), quiet=True))
    return content


def _router(router: dict[str, float | str | None]) -> str:
    area = "" if router["auc"] is None else f"; AUC {router['auc']:.2f} against their labels"
    rows = f"{router['examples']} labelled training rows"
    return (
        f"The vote is that of persona {router['persona']}, without an answer to look at. Its threshold, "
        f"{router['threshold']:.3f}, is from {rows}{area}. Votes are not counted as tokens."
    )
