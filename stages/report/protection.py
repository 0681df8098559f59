"""Gain and loss of a run, on the new rows and on the protected ones: one small table on its page."""

from __future__ import annotations

from stages.config import TRAINED, Config
from stages.evaluation.metrics import accuracy_by_item
from stages.evaluation.statistics import paired_difference
from stages.report import comparison
from stages.report.page import Block, Grid
from stages.store.artifacts import Artifact


def blocks(config: Config, artifacts: dict[str, Artifact]) -> list[Block]:
    """Build the table: the base's accuracy on each benchmark, the change after each step, and the drift.

    Empty without `partition.protect`, or if nothing is trained yet.
    """
    trained = {target: artifacts[step] for target, step in TRAINED.items() if step in artifacts}
    if not config.partition.protect or not trained:
        return []
    accuracies = {
        benchmark: {
            target: accuracy_by_item(comparison.answers_of(artifacts[step]))
            for target in ("base", *TRAINED)
            if (step := f"eval:{target}@{benchmark}") in artifacts
        }
        for benchmark in config.eval.benchmarks
    }
    rows = [
        [name, *_base(by_target.get("base")), *(_change(by_target, target) for target in trained)]
        for name, by_target in accuracies.items()
        if by_target
    ]
    summaries = {target: artifact.manifest["summary"] for target, artifact in trained.items()}
    drift = [f"{s['protected_kl']:.3g}" if "protected_kl" in s else "" for s in summaries.values()]
    if any(drift):
        held_out = artifacts["score:protected"].manifest["summary"]["held_out"]
        rows.append(["drift on held-out protected rows", str(held_out), "", *drift])
    shares = ", ".join(f"{target} trains {100 * s['active_share']:.1f} %" for target, s in summaries.items())
    masks = next(a for name, a in artifacts.items() if name.startswith("partition:")).manifest["summary"]
    caption = (
        "Change of the accuracy against the base in points [95 % interval, paired over items]. Drift: KL "
        "from the adapter that the stage starts with, in nats per token of the answers. Of the elements, "
        f"{100 * masks['protected'] / masks['elements']:.1f} % are protected; {shares}."
    )
    return [Grid(["", "items", "base, %", *trained], rows, caption)]


def _base(base: dict[str, float] | None) -> list[str]:
    """Return the number of items, and the accuracy in per cent."""
    return [str(len(base)), f"{100 * sum(base.values()) / len(base):.1f}"] if base else ["", ""]


def _change(by_target: dict[str, dict[str, float]], stage: str) -> str:
    """Return the change against the base on the items that both answered, with its interval."""
    base, trained = by_target.get("base", {}), by_target.get(stage, {})
    items = [item for item in base if item in trained]
    if not items:
        return ""
    points = paired_difference([base[item] for item in items], [trained[item] for item in items])
    change, low, high = (100 * value for value in points)
    return f"{change:+.1f} [{low:.1f}, {high:.1f}]"
