"""Figures of replicates: from the grade of each answer where these are kept, else from their values.

python benchmarks/replicates.py                          write the tables into the pages of docs/results
python benchmarks/replicates.py --check                  fail if they stand there otherwise (`make check`)
python benchmarks/replicates.py --add demo 53 runs/r53   keep the answers of a run as the demo's replicate 53

An arm is a target of eval, `rl fast` for rl:fast; `--as NAME` puts NAME behind it, such as `rl int8`.
`--check` also compares every mean and interval that stands beside the values of its replicates in earlier.md,
and looks for those that README and the guide quote in the tables.
"""

import argparse
import gzip
import json
import re
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import experiments
from experiments import Contrast

from stages.evaluation.statistics import over_replicates, p_value, paired_difference

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "docs/results"
FOUND, DEMO_PAGE, EARLIER = RESULTS / "found.md", RESULTS / "demo.md", RESULTS / "earlier.md"
QUOTING = (ROOT / "README.md", ROOT / "docs/when.md", ROOT / "docs/related.md", FOUND, DEMO_PAGE)
"""Pages that quote no interval but those of the tables, or of the times that scripts measured."""
GUIDE = sorted({*(ROOT / "docs").glob("*.md")} - {*QUOTING, ROOT / "docs/failed.md"})
"""The other pages, which quote earlier.md as well; failed.md has figures of its own."""
_NUMBER = r"[-+]?\d+\.\d"
VALUES = re.compile(rf"\| ((?:{_NUMBER}, ){{4,}}{_NUMBER}) \| ({_NUMBER}) \[({_NUMBER}), ({_NUMBER})\]")
"""At least five values, their mean, and its interval, in cells of a table."""
QUOTED = re.compile(rf"({_NUMBER}\d?)(?:\s[%*a-z]+){{0,4}},?\s\[({_NUMBER}\d?)(?:, |–)({_NUMBER}\d?)\]")
"""A mean with its interval, in a sentence or a table."""
ROUNDING = 0.16
"""Farthest that a mean or an end may lie from the one of the rounded values."""
BEGIN, END = "<!-- Written by benchmarks/replicates.py from {}-items.json.gz -->\n\n", "\n<!-- end -->"
Replicate = dict[str, Any]
"""`system` of each item, for which its generator made it, and the `arms` by name.

An arm answered the first of these items or all. `right`: 1 or 0 for each; `tokens` of each answer; `cut`:
how many answers did not end.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--add", nargs=3, metavar=("|".join(EXPERIMENTS), "K", "RUN"))
    parser.add_argument("--as", dest="suffix", default="", metavar="NAME")
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    computed = [(RESULTS / "times.md").read_text(encoding="utf-8")]
    for name, (page, tables, benchmarks) in EXPERIMENTS.items():
        items = RESULTS / f"{name.partition(' ')[0]}-items.json.gz"
        if not items.exists() and not (arguments.add and arguments.add[0] == name):
            continue  # it is planned, and no run is there
        replicates = json.loads(gzip.decompress(items.read_bytes())) if items.exists() else {}
        if arguments.add and arguments.add[0] == name:
            add(replicates, arguments.add[1], Path(arguments.add[2]), benchmarks, arguments.suffix)
            text = json.dumps(dict(sorted(replicates.items())), separators=(",", ":"))
            items.write_bytes(gzip.compress(text.encode(), mtime=0))
        text = page.read_text(encoding="utf-8")
        begin = BEGIN.format(name.partition(" ")[0])
        head, _, tail = text.partition(begin)
        computed.append("\n".join([*tables(replicates), ""]))
        written = head + begin + computed[-1] + END + tail.partition(END.strip())[2]
        if arguments.check and written != text:
            sys.exit(f"{page.name} says other things than {items.name}: run benchmarks/replicates.py")
        page.write_text(written, encoding="utf-8")
    known, earlier = "\n".join(computed), EARLIER.read_text(encoding="utf-8")
    unknown = [*unknown_quotes(QUOTING, known), *unknown_quotes(GUIDE, known + earlier)]
    if wrong := [*wrong_means(earlier), *unknown]:
        sys.exit("\n".join(wrong))


def add(
    replicates: dict[str, Replicate], k: str, run: Path, benchmarks: tuple[str, ...], suffix: str
) -> None:
    """Keep the answers to these benchmarks of each target of a run; `suffix` stands behind the targets.

    Of several benchmarks an item's `system` is the number of its benchmark.
    """
    replicate = replicates.setdefault(k, {"system": [], "arms": {}})
    samples_of: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for file in sorted(run.glob("eval/*/manifest.json")):
        target, _, name = json.loads(file.read_text(encoding="utf-8"))["variant"].partition("@")
        if name not in benchmarks:
            continue
        with (file.parent / "samples.jsonl").open(encoding="utf-8") as lines:
            samples_of.setdefault(target, {})[name] = [json.loads(line) for line in lines]
    ids: list[str] = []
    for target, parts in samples_of.items():
        if len(parts) < len(benchmarks):
            continue
        numbered = [(number, sample) for number, name in enumerate(benchmarks, 1) for sample in parts[name]]
        samples = [sample for _, sample in numbered]
        of_arm = [sample["id"] for sample in samples]
        if ids[: len(of_arm)] != of_arm[: len(ids)]:
            sys.exit(f"{run}, {target}: these are other items")
        if len(of_arm) > len(ids):
            ids, several = of_arm, len(benchmarks) > 1
            replicate["system"] = [n if several else sample["extra"]["intended"] for n, sample in numbered]
        replicate["arms"][f"{target.replace(':', ' ')} {suffix}".rstrip()] = {
            "right": [int(sample["correct"]) for sample in samples],
            "tokens": [sample["extra"]["tokens"] for sample in samples],
            "cut": sum(sample["outcome"] == "truncated" for sample in samples),
        }


def wrong_means(page: str) -> Iterator[str]:
    """Rows of tables whose mean or interval does not follow from the values of their replicates."""
    for row in VALUES.finditer(page):
        values = [float(value) for value in row[1].split(", ")]
        interval = over_replicates(values)
        computed = [statistics.mean(values), *((interval.low, interval.high) if interval else ())]
        printed = [float(row[number]) for number in (2, 3, 4)]
        if any(abs(value - figure) > ROUNDING for value, figure in zip(computed, printed, strict=True)):
            yield f"{row[0]}: computed {', '.join(f'{value:.2f}' for value in computed)}"


def unknown_quotes(pages: Iterable[Path], tables: str) -> Iterator[str]:
    """Means and intervals on these pages that are not in the tables, of either sign."""
    known = {_quoted(match) for match in QUOTED.finditer(tables)}
    for page in pages:
        text = page.read_text(encoding="utf-8")
        for match in QUOTED.finditer(text):
            mean, low, high = quote = _quoted(match)
            if not {quote, (-mean, -high, -low)} & known:
                line = text[: match.start()].count("\n") + 1
                yield f"{page.name}:{line}: {match[0]} is in no table that is computed"


def tables_of(
    arms: dict[str, str], compared: tuple[Contrast, ...], replicates: dict[str, Replicate]
) -> Iterator[str]:
    """Lines of Markdown: accuracies of each replicate in arms with these titles, then the contrasts."""
    yield f"| k | {' | '.join(arms.values())} |"
    yield "|---" * (1 + len(arms)) + "|"
    for k, replicate in replicates.items():
        cells = [_by_system(replicate, arm) if arm in replicate["arms"] else "not run" for arm in arms]
        yield f"| {k} | {' | '.join(cells)} |"
    yield ""
    yield from contrasts(replicates, compared)


def modes_tables(replicates: dict[str, Replicate]) -> Iterator[str]:
    """Lines of Markdown as of `tables_of`, with the random mixture of fast and slow as long as auto."""
    for replicate in replicates.values():
        fast, auto, slow = (replicate["arms"][f"rl {mode}"] for mode in ("fast", "auto", "slow"))
        fewest, tokens, most = (statistics.mean(arm["tokens"]) for arm in (fast, auto, slow))
        share = min(1, (tokens - fewest) / (most - fewest))  # of slow
        pairs = zip(fast["right"], slow["right"], strict=True)
        replicate["arms"]["mixture"] = {"right": [(1 - share) * f + share * s for f, s in pairs]}
    yield from tables_of(experiments.MODES_ARMS, experiments.MODES, replicates)


def means_table(replicates: dict[str, Replicate]) -> Iterator[str]:
    """Lines of Markdown: accuracy of each arm by kind of item, and tokens, in the mean of replicates."""
    yield f"| | items | {' | '.join(experiments.MODES_ARMS.values())} |"
    yield "|---" * (2 + len(experiments.MODES_ARMS)) + "|"
    for title, part, items in (("all", "", 300), ("one step", ":1", 100), ("two steps", ":2", 200)):
        of_arms = [[_right(r, arm + part) for r in replicates.values()] for arm in experiments.MODES_ARMS]
        cells = [f"{statistics.mean(100 * statistics.mean(right) for right in of):.1f}" for of in of_arms]
        yield f"| {title} | {items} | {' | '.join(cells)} |"
    lengths = [
        statistics.mean(_tokens(r, arm) for r in replicates.values()) for arm in experiments.MODES_ARMS
    ]
    yield f"| tokens | | {' | '.join(f'{length:.0f}' for length in lengths)} |"


def unlike_tables(replicates: dict[str, Replicate]) -> Iterator[str]:
    """Lines of Markdown as of `tables_of`, with arms made of the answers of others.

    `two`: SFT's answers to System 1's items and RL's to System 2's.
    """
    for replicate in replicates.values():
        arms = replicate["arms"]
        for elements in [name.removeprefix("rl ") for name in arms if name.startswith("rl ")]:
            fast, slow = (arms[f"{target} {elements}"]["right"] for target in ("sft", "rl"))
            answers = zip(replicate["system"], fast, slow, strict=True)
            arms[f"two {elements}"] = {"right": [f if system == 1 else s for system, f, s in answers]}
    yield from tables_of(experiments.UNLIKE_ARMS, experiments.UNLIKE, replicates)


def contrasts(replicates: dict[str, Replicate], compared: tuple[Contrast, ...]) -> Iterator[str]:
    """Lines of Markdown: of each contrast the replicates in which all its arms were run, and their mean."""
    yield "| contrast, in points | by replicate | mean |"
    yield "|---|---|---|"
    for name, arm, references in compared:
        names = {name.partition(":")[0] for name in (arm, *references)}
        complete = [replicate for replicate in replicates.values() if names <= set(replicate["arms"])]
        if differences := [_difference(replicate, arm, references) for replicate in complete]:
            by_replicate = ", ".join(f"{difference:+.1f}" for difference in differences)
            yield f"| {name} | {by_replicate} | {_mean(differences)} |"


EXPERIMENTS: dict[str, tuple[Path, Callable[[dict[str, Replicate]], Iterator[str]], tuple[str, ...]]] = {
    "demo": (DEMO_PAGE, partial(tables_of, experiments.DEMO_ARMS, experiments.DEMO), ("demo",)),
    "modes": (DEMO_PAGE, modes_tables, ("demo",)),
    "modes means": (ROOT / "README.md", means_table, ("demo",)),
    "raft": (FOUND, partial(tables_of, experiments.RAFT_ARMS, experiments.RAFT), ("final",)),
    "counts": (FOUND, partial(tables_of, experiments.COUNTS_ARMS, experiments.COUNTS), ("final",)),
    "default": (FOUND, partial(tables_of, experiments.COUNTS_ARMS, experiments.DEFAULT), ("final",)),
    "protect": (FOUND, partial(tables_of, experiments.PROTECT_ARMS, experiments.PROTECT), ("old", "new")),
    "unlike": (FOUND, unlike_tables, ("recall", "chains")),
}
"""By name: the page of an experiment, its tables, and the benchmarks on which it was measured."""


def _difference(replicate: Replicate, arm: str, references: tuple[str, ...]) -> float:
    right = {name: _right(replicate, name) for name in (arm, *references)}
    best = max(references, key=lambda name: sum(right[name]))
    return 100 * paired_difference(right[best], right[arm])[0]


def _mean(differences: list[float]) -> str:
    mean, interval = statistics.mean(differences), over_replicates(differences)
    if interval is None or interval.p is None:
        return f"{mean:+.1f}"
    return f"{mean:+.1f} [{interval.low:.1f}, {interval.high:.1f}], {p_value(interval.p)}"


def _right(replicate: Replicate, name: str) -> list[int]:
    arm, _, system = name.partition(":")
    right: list[int] = replicate["arms"][arm]["right"]
    return _of(replicate, int(system), right) if system else right


def _of(replicate: Replicate, system: int, right: list[int]) -> list[int]:
    return [answer for answer, of in zip(right, replicate["system"], strict=False) if of == system]


def _tokens(replicate: Replicate, name: str) -> float:
    return statistics.mean(replicate["arms"][name]["tokens"])


def _percent(right: list[int]) -> str:
    return f"{100 * statistics.mean(right):.1f}"


def _by_system(replicate: Replicate, name: str) -> str:
    """Accuracy in per cent, and in brackets that of System 1 and System 2 items."""
    right = replicate["arms"][name]["right"]
    return f"{_percent(right)} ({', '.join(_percent(_of(replicate, system, right)) for system in (1, 2))})"


def _quoted(match: re.Match[str]) -> tuple[float, ...]:
    """Mean, lower and upper end, to one decimal, as pages quote them."""
    return tuple(round(float(figure), 1) for figure in match.groups())


if __name__ == "__main__":
    main()
