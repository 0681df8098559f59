"""What each setting buys, alone: a table of rows of settings on one base config, over seeds.

    python benchmarks/ablation.py TABLE.yaml [--seeds 2 3 4] [--only ROW …] [--set KEY=VALUE …]

Each cell (row × seed) is one `lorapar run`; cells share every stage whose settings they share, and a second
call goes on where the first stopped. Accuracies are those of RL, in the mean over seeds; differences are
those to the SFT adapter of the same seed on the same items. Their interval (95 %, Student's t) and p (exact
McNemar test with one seed, Wilcoxon's signed-rank test with more) are over items, each item's value being its
mean over seeds: the chance in items is in them, that in seeds is not. So the smallest and the largest
difference of a seed stand behind.
"""

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from scipy.stats import sem, t

from stages.benchmarks.statistics import paired_p
from stages.lora.drift import NAME
from stages.pipeline.plan import plan
from stages.pipeline.resolve import load, resolved
from stages.store.artifacts import Artifact, Store

Answers = dict[str, dict[str, Any]]
"""Item → its row of samples.jsonl."""


@dataclass(frozen=True)
class Cell:
    """One row with one seed."""

    before: Answers
    """By the SFT adapter."""
    after: Answers
    """By that of RL."""
    history: list[dict[str, Any]]
    completions: int
    seconds: float
    """Of the rl stage."""


def run(table: dict[str, Any], settings: dict[str, Any], seed: int, more: list[str]) -> Cell:
    """Make what is missing of a cell, and read it."""
    pairs = {**table.get("set", {}), **settings, "seed": seed}
    overrides = [*(f"{key}={json.dumps(value)}" for key, value in pairs.items()), *more]
    command = [sys.executable, "-m", "lorapar_cli", "run", table["base"]]
    for override in overrides:
        command += ["--set", override]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    config = resolved(load(Path(table["base"]), overrides))
    steps, store = plan(config), Store(config.root)
    (benchmark,) = config.eval.benchmarks

    def artifact(name: str) -> Artifact:
        found = store.load(store.folder(steps[name].stage.name, steps[name].key))
        assert found is not None, name
        return found

    rl = artifact("rl")
    history = json.loads((rl.path / "history.json").read_text(encoding="utf-8"))
    drawn = sum(step.get("resampled/completions", 0) for step in history)
    return Cell(
        answers(artifact(f"eval:sft@{benchmark}").path),
        answers(artifact(f"eval:rl@{benchmark}").path),
        history,
        int(len(history) // config.rl.iterations * config.rl.prompts_per_step * config.rl.group + drawn),
        rl.manifest["seconds"],
    )


def answers(folder: Path) -> Answers:
    lines = (folder / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    return {row["id"]: row for row in map(json.loads, lines)}


def shares(parts: list[Answers], of: Callable[[dict[str, Any]], bool]) -> list[float]:
    """For each item that counts: the share of seeds in which it was answered correctly."""
    names = [name for name, row in parts[0].items() if of(row)]
    return [statistics.fmean(part[name]["correct"] for part in parts) for name in names]


def difference(cells: list[Cell], of: Callable[[dict[str, Any]], bool]) -> str:
    """RL less SFT, in points: `mean [low, high] p (smallest to largest of a seed)`."""
    before, after = shares([c.before for c in cells], of), shares([c.after for c in cells], of)
    change = [b - a for a, b in zip(before, after, strict=True)]
    mean, error = statistics.fmean(change), float(sem(change))
    reach = error * float(t.ppf(0.975, len(change) - 1))
    seeds = [
        statistics.fmean(shares([c.after], of)) - statistics.fmean(shares([c.before], of)) for c in cells
    ]
    low, high = 100 * (mean - reach), 100 * (mean + reach)
    spread = f" ({100 * min(seeds):+.1f} to {100 * max(seeds):+.1f})" if len(seeds) > 1 else ""
    return f"{100 * mean:+.1f} [{low:+.1f}, {high:+.1f}] p = {paired_p(before, after):.2g}{spread}"


def line(name: str, cells: list[Cell], by: str) -> list[str]:
    groups: list[Callable[[dict[str, Any]], bool]] = [
        lambda row: True,
        lambda row: row["extra"][by] == 1,
        lambda row: row["extra"][by] == 2,
    ]
    made = [name]
    for group in groups:
        made += [f"{100 * statistics.fmean(shares([c.after for c in cells], group)):.1f}"]
        made += [difference(cells, group)]
    for name, steps, form in (("completions/mean_length", 5, ".1f"), (NAME, 1, ".3f")):
        last = [[step[name] for step in cell.history if name in step][-steps:] for cell in cells]
        made.append(f"{statistics.fmean(map(statistics.fmean, last)):{form}}" if all(last) else "–")
    made += [f"{statistics.fmean(c.completions for c in cells):.0f}"]
    return [*made, f"{statistics.fmean(c.seconds for c in cells) / 60:.1f}"]


HEAD = (
    "row",
    "all",
    "− SFT",
    "System 1",
    "− SFT",
    "System 2",
    "− SFT",
    "tokens",
    "KL",
    "completions",
    "minutes",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("table", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", help="instead of the table's")
    parser.add_argument("--only", nargs="+", help="these rows")
    parser.add_argument("--set", dest="more", nargs="+", default=[], metavar="KEY=VALUE")
    given = parser.parse_args()
    table = yaml.safe_load(given.table.read_text(encoding="utf-8"))
    seeds = given.seeds or table["seeds"]
    rows = {
        name: settings for name, settings in table["rows"].items() if not given.only or name in given.only
    }
    cells: dict[str, list[Cell]] = {name: [] for name in rows}
    for seed in seeds:  # all rows of one seed first: an early look compares rows
        for name, settings in rows.items():
            cells[name].append(run(table, settings, seed, given.more))
            print(f"seed {seed}: " + " | ".join(line(name, cells[name][-1:], table["by"])), flush=True)
    first = next(iter(cells.values()))
    n = len(first[0].after)
    print(f"\n{n} items, seeds {', '.join(map(str, seeds))}, {given.table}\n")
    for group, wanted in (("all", (1, 2)), ("System 1", (1,)), ("System 2", (2,))):
        found = shares([c.before for c in first], lambda row, w=wanted: row["extra"][table["by"]] in w)
        print(f"SFT, {group} (n = {len(found)}): {100 * statistics.fmean(found):.1f} %")
    print("\n| " + " | ".join(HEAD) + " |\n" + "|---" * len(HEAD) + "|")
    for name, of_row in cells.items():
        print("| " + " | ".join(line(name, of_row, table["by"])) + " |")


if __name__ == "__main__":
    main()
