"""The arms of a table at equal KL from SFT, and System 1's change at equal gain on System 2, as Markdown.

    python benchmarks/equal_kl.py configs/tables/rl-elements.yaml [--seeds 11,12]

Reads what `lorapar sweep` made, and evaluates nothing. Rows with RL set `rl.max_steps`, `rl.keep_steps` and
`rl.kl_probe_prompts`; SFT and RL are evaluated on a benchmark `final`, kept steps on its first items, `part`.
"""

import argparse
import json
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from stages import escaping
from stages.evaluation.metrics import accuracy_by_item
from stages.lora.training.curves import KL_FROM_START
from stages.sweep.file import Column
from stages.sweep.results import Artifacts, answers
from stages.sweep.table import Cell, table
from stages.sweep.values import ItemAccuracy, Value, difference

GROUPS = ("intended=1", "intended=2")  # items that are meant as System 1, and as System 2
LEGEND = """\
Changes are in points against each arm's own SFT, on the items of `part`, in the mean over seeds, with 95 %
intervals of a bootstrap over seeds and items. The lower table, which has no intervals, interpolates linearly
between the steps, from 0 at SFT; where an arm passes a value several times, the last counts. Its common KL is
the smallest final one of the arms, its common gain the smallest final one of those that gained any."""


@dataclass(frozen=True)
class Point:
    """An arm after a step of RL: the KL from SFT in nats per token, and the changes against SFT."""

    step: int
    kl: float
    system1: Value
    system2: Value


def targets(cell: Cell) -> dict[int, str]:
    """Map each evaluated step of RL to its TARGET@BENCHMARK; the first is of `part`."""
    rl = cell.config.rl
    return {**{step: f"rl-{step}@part" for step in sorted(rl.keep_steps)}, rl.max_steps or 0: "rl@final"}


def missing_steps(artifacts: Artifacts, cell: Cell) -> list[str]:
    """Return the steps of a cell that have no artifact, and those of RL that have no KL in its history."""
    evaluations = [f"eval:{target}" for target in ("sft@final", *targets(cell).values())]
    if missing := [step for step in ("rl", *evaluations) if artifacts.current(cell, step) is None]:
        return missing
    measured = kl_by_step(artifacts, cell)
    return [f"KL at step {step} (rl.kl_probe_steps)" for step in targets(cell) if step not in measured]


def accuracies(artifacts: Artifacts, cell: Cell, text: str) -> ItemAccuracy:
    """Return the accuracy of each item of a column, such as `rl@final.intended=1`."""
    column = Column.from_text(text)
    artifact = artifacts.current(cell, column.step)
    assert artifact
    return accuracy_by_item(answers(artifact, column))


def kl_by_step(artifacts: Artifacts, cell: Cell) -> dict[int, float]:
    artifact = artifacts.current(cell, "rl")
    assert artifact
    history = json.loads((artifact.path / "history.json").read_text(encoding="utf-8"))
    return {row["step"]: row[KL_FROM_START] for row in history if KL_FROM_START in row}


def curve(artifacts: Artifacts, cells: list[Cell]) -> list[Point]:
    """Return the points of an arm on the items of `part`, in the mean over its cells, one of each seed."""
    kl = [kl_by_step(artifacts, cell) for cell in cells]
    evaluated = targets(cells[0])
    changes: list[list[Value]] = []
    for group in GROUPS:
        sft, *by_step = (
            [accuracies(artifacts, cell, f"{target}.{group}") for cell in cells]
            for target in ("sft@final", *evaluated.values())
        )
        start = [
            {item: accuracy for item, accuracy in of_final.items() if item in of_part}
            for of_final, of_part in zip(sft, by_step[0], strict=True)
        ]
        changes.append([difference(start, of_step, own_items=True) for of_step in by_step])
    return [
        Point(step, statistics.fmean(of_seed[step] for of_seed in kl), system1, system2)
        for step, system1, system2 in zip(evaluated, *changes, strict=True)
    ]


def interpolated(xs: Sequence[float], ys: Sequence[float], x: float) -> float | None:
    """Return y where the broken line through (0, 0) and the points has x; None if it has it nowhere.

    Where it has x several times, the last counts: there the arm was trained longest.
    """
    for (x0, y0), (x1, y1) in reversed(list(pairwise([(0.0, 0.0), *zip(xs, ys, strict=True)]))):
        if min(x0, x1) <= x <= max(x0, x1):
            return y1 if x0 == x1 else y0 + (y1 - y0) * (x - x0) / (x1 - x0)
    return None


def in_points(value: float | None) -> str:
    return "not reached" if value is None else f"{100 * value:+z.1f}"


def steps_table(curves: dict[str, list[Point]]) -> Iterator[str]:
    yield from ("| | step | KL from SFT | System 1 | System 2 |", "| --- | --- | --- | --- | --- |")
    for arm, points in curves.items():
        for point in points:
            line = f"| {escaping.markdown(arm)} | {point.step} | {point.kl:.4f} |"
            for value in (point.system1, point.system2):
                ends = value.bootstrap
                interval = f" [{in_points(ends.low)}, {in_points(ends.high)}]" if ends else ""
                line += f" {in_points(value.mean)}{interval} |"
            yield line


def equal_table(curves: dict[str, list[Point]]) -> Iterator[str]:
    gain = min((gain for *_, last in curves.values() if (gain := last.system2.mean) > 0), default=0.0)
    kl = min(last.kl for *_, last in curves.values())
    head = f"| | System 1 at System 2's {in_points(gain)} | System 1 at KL {kl:.4f} | System 2 at this KL |"
    yield from (head, "| --- | --- | --- | --- |")
    for arm, points in curves.items():
        numbers = [(point.kl, point.system1.mean, point.system2.mean) for point in points]
        kls, first, second = zip(*numbers, strict=True)
        lines = ((second, first, gain), (kls, first, kl), (kls, second, kl))
        cells = [in_points(interpolated(*line)) for line in lines]
        yield f"| {escaping.markdown(arm)} | {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("table", type=Path)
    parser.add_argument("--seeds", type=lambda text: [int(seed) for seed in text.split(",")])
    arguments = parser.parse_args()
    artifacts = Artifacts()
    arms: dict[str, list[Cell]] = {}
    missing: dict[str, list[str]] = {}
    for cell in table(arguments.table, seeds=arguments.seeds).cells:
        if any("rl" in column.steps for column in cell.columns.values()):
            arms.setdefault(cell.row, []).append(cell)
            if steps := missing_steps(artifacts, cell):
                missing.setdefault(cell.row, []).append(f"seed {cell.seed}: {', '.join(steps)}")
    if curves := {arm: curve(artifacts, cells) for arm, cells in arms.items() if arm not in missing}:
        print(*steps_table(curves), "", *equal_table(curves), "", LEGEND, "", sep="\n")
    for arm, gaps in missing.items():
        print(f"Missing: {escaping.markdown(arm)} ({'; '.join(gaps)})")


if __name__ == "__main__":
    main()
