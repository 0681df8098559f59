"""Figures of replicates: from the grade of each answer where these are kept, else from values by replicate.

python benchmarks/replicates.py                          write the tables and the plot that follow from them
python benchmarks/replicates.py --check                  fail if they stand there otherwise (`make check`)
python benchmarks/replicates.py --add demo 53 runs/r53   keep the answers of a run as the demo's replicate 53

An arm is a target of eval, `rl fast` for rl:fast; `--as NAME` puts NAME behind it, such as `rl int8`.
Written are NAME.csv of each experiment, the figures in contrasts.csv, found.svg, all in docs/results, and
README's table of modes. A cell of found.md such as `-4.4 [-6.5, -2.2]; 14: A1, D2, G1` names the contrasts
that it pools: their differences by replicate count alike, the interval is Student's. `--check` computes these
cells, and looks among the contrasts for each other mean with an interval that README and the guide quote.
"""

import argparse
import csv
import gzip
import io
import json
import re
import statistics
import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import forest
from experiments import EXPERIMENTS, MODES_ARMS, Experiment, systems_by_words

from stages.evaluation.statistics import over_replicates

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "docs/results"
README, FOUND, TIMES = ROOT / "README.md", RESULTS / "found.md", RESULTS / "times.md"
CONTRASTS = RESULTS / "contrasts.csv"
PAGES = (README, FOUND, *sorted({*(ROOT / "docs").glob("*.md")} - {ROOT / "docs/failed.md"}))
"""Pages whose figures are looked for; failed.md has figures of its own, whose answers were not kept."""
NOT_KEPT = "## Answers that were not kept"
"""Heading of found.md below which figures are not computed."""
_NUMBER = r"[-+]?\d+\.\d"
QUOTED = re.compile(rf"({_NUMBER}\d?)(?:\s[%*a-z]+){{0,4}},?\s\[({_NUMBER}\d?)(?:, |–)({_NUMBER}\d?)\]")
"""A mean with its interval, in a sentence or a table."""
VERDICT = re.compile(rf"({_NUMBER} \[{_NUMBER}, {_NUMBER}\]; \d+): ([^|)]+?)(?: \||\))")
"""A pooled mean with its interval and the number of replicates, and the codes of the contrasts."""
MEANS = re.compile("(?<=<!-- Means of modes-items.json.gz -->\n\n).*?(?=<!-- end -->)", re.DOTALL)
"""Where README's table of modes stands."""
Replicate = dict[str, Any]
"""`system` of each item, for which its generator made it, and the `arms` by name.

An arm answered the first of these items or all. `right`: 1 or 0 for each; `tokens` of each answer; `text`:
what was answered, since 2026-12-03. `words`: the system of each item as its words let one guess.
"""


Table = dict[str, dict[str, dict[str, float]]]
"""By replicate and arm: accuracy in per cent of `all` and of the two kinds of items, and `tokens` if kept."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--add", nargs=3, metavar=("|".join(EXPERIMENTS), "K", "RUN"))
    parser.add_argument("--as", dest="suffix", default="", metavar="NAME")
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    if arguments.add:
        name, k, run = arguments.add
        replicates = items_of(name)
        add(
            replicates.setdefault(k, {"system": [], "arms": {}}),
            Path(run),
            EXPERIMENTS[name],
            arguments.suffix,
        )
        text = json.dumps(dict(sorted(replicates.items())), separators=(",", ":"))
        _items(name).write_bytes(gzip.compress(text.encode(), mtime=0))
    tables, files = {}, {}
    for name, experiment in EXPERIMENTS.items():
        path = RESULTS / f"{name}.csv"
        if replicates := items_of(name):
            rows = (row for k, replicate in replicates.items() for row in rows_of(k, replicate, experiment))
            files[path] = "\n".join(["replicate,arm,kind,accuracy,tokens", *rows, ""])
        text = files.get(path) or (path.read_text(encoding="utf-8") if path.exists() else "")
        tables[name] = table_of(text, experiment.modes)
    if tables["modes"]:
        means = "\n".join([*means_table(tables["modes"]), "", ""])
        files[README] = MEANS.sub(means, README.read_text(encoding="utf-8"))
    files[CONTRASTS], differences = contrasts(CONTRASTS.read_text(encoding="utf-8"), tables)
    pooled, wrong = verdicts(FOUND.read_text(encoding="utf-8"), differences)
    files[RESULTS / "found.svg"] = forest.plot([row for row in pooled if row[0]])
    for path, text in files.items():
        if not arguments.check:
            path.write_text(text, encoding="utf-8")
        elif path.read_text(encoding="utf-8") != text:
            sys.exit(f"{path.name} does not follow from the answers: run benchmarks/replicates.py")
    known = {_figures(values)[:3] for values in differences.values()} | {row[1] for row in pooled}
    known |= {_quoted(match) for match in QUOTED.finditer(TIMES.read_text(encoding="utf-8"))}
    if wrong := [*wrong, *unknown_quotes(PAGES, known)]:
        sys.exit("\n".join(wrong))


def items_of(name: str) -> dict[str, Replicate]:
    """The replicates of an experiment whose answers are kept; none of one that is planned."""
    path = _items(name)
    return json.loads(gzip.decompress(path.read_bytes())) if path.exists() else {}


def add(replicate: Replicate, run: Path, experiment: Experiment, suffix: str) -> None:
    """Keep the answers of each target of a run to the experiment's benchmarks.

    Of several benchmarks an item's `system` is the number of its benchmark.
    """
    benchmarks = experiment.benchmarks
    samples_of: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for file in sorted(run.glob("eval/*/manifest.json")):
        target, _, name = json.loads(file.read_text(encoding="utf-8"))["variant"].partition("@")
        if name in benchmarks:
            samples_of.setdefault(target, {})[name] = _read(file.parent / "samples.jsonl")
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
            "text": [sample["output"] for sample in samples],
        }
    if experiment.modes and not suffix:
        test, train = (
            _read(run / f"classify/latest-{name}/labels.jsonl") for name in (benchmarks[0], "train")
        )
        questions = {row["id"]: row["prompt"] for row in test}
        rows = [(row["prompt"], row["system"]) for row in train if row["system"]]
        replicate["words"] = systems_by_words(rows, [questions[number] for number in ids])


def rows_of(k: str, replicate: Replicate, experiment: Experiment) -> Iterator[str]:
    """Accuracy and tokens of each arm by kind of item, with the mode that the words of a question choose."""
    arms = replicate["arms"]
    if "words" in replicate:
        chosen = [(arms[experiment.modes[0]], arms[experiment.modes[-1]])[n - 1] for n in replicate["words"]]
        arms["words"] = {key: [arm[key][i] for i, arm in enumerate(chosen)] for key in ("right", "tokens")}
    for name, arm in arms.items():
        answers = list(zip(arm["right"], arm["tokens"], replicate["system"], strict=False))
        for number, kind in enumerate(("all", *experiment.kinds)):
            right, tokens = zip(*((r, t) for r, t, system in answers if number in (0, system)), strict=True)
            yield f"{k},{name},{kind},{100 * statistics.mean(right):.3f},{statistics.mean(tokens):.1f}"


def table_of(text: str, modes: tuple[str, ...]) -> Table:
    """The cells of a file, and of the arm `mixture`: fast or slow at random, with as many tokens as auto."""
    table: Table = {}
    for row in csv.DictReader(io.StringIO(text)):
        cells = table.setdefault(row["replicate"], {}).setdefault(row["arm"], {})
        cells[row["kind"]] = float(row["accuracy"])
        if row["kind"] == "all" and row["tokens"]:
            cells["tokens"] = float(row["tokens"])
    for arms in table.values():
        if modes and set(modes) <= set(arms):
            fast, auto, slow = (arms[mode] for mode in modes)
            share = min(1, (auto["tokens"] - fast["tokens"]) / (slow["tokens"] - fast["tokens"]))  # of slow
            arms["mixture"] = {key: (1 - share) * cell + share * slow[key] for key, cell in fast.items()}
    return table


def contrasts(written: str, tables: dict[str, Table]) -> tuple[str, dict[str, list[float]]]:
    """contrasts.csv with its figures, and the differences by replicate of each code.

    Its first five columns are written by hand. `minus`: arms of which the best one is subtracted. `ARM:1` and
    `ARM:2` are an arm's answers to the items of that kind alone, `ARM + ARM` is the mean of two arms.
    """
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    head, *rows = csv.reader(io.StringIO(written))
    writer.writerow(head)
    differences = {}
    for code, name, title, arm, minus, *_ in rows:
        kinds, values = EXPERIMENTS[name].kinds, []
        for arms in tables[name].values():
            with suppress(KeyError):  # an arm was not run
                best = max(_accuracy(arms, kinds, reference) for reference in minus.split(" | "))
                values.append(_accuracy(arms, kinds, arm) - best)
        if values:
            differences[code] = values
        by_replicate = " ".join(f"{value:+.1f}" for value in values)
        writer.writerow([code, name, title, arm, minus, by_replicate, *_figures(values)])
    return out.getvalue(), differences


def verdicts(page: str, differences: dict[str, list[float]]) -> tuple[list[forest.Row], list[str]]:
    """Each place of the page that pools contrasts, with its question in a table; and what is wrong there."""
    rows: list[forest.Row] = []
    wrong = []
    for line in page.splitlines():
        if match := VERDICT.search(line):
            parts = [differences[code] for code in match[2].split(", ")]
            values = [value for part in parts for value in part]
            mean, low, high, _ = _figures(values)
            if (pooled := f"{mean:+.1f} [{low:.1f}, {high:.1f}]; {len(values)}") != match[1]:
                wrong.append(f"found.md: {match[0]} is {pooled}")
            question = line.split("|")[1].strip() if line.startswith("|") else ""
            rows.append((question, (mean, low, high), [*map(statistics.mean, parts)]))
    return rows, wrong


def unknown_quotes(pages: Iterable[Path], known: set[tuple[float, ...]]) -> Iterator[str]:
    """Means and intervals on these pages that are not known, of either sign."""
    for page in pages:
        text = page.read_text(encoding="utf-8").partition(NOT_KEPT)[0]
        for match in QUOTED.finditer(text):
            mean, low, high = quote = _quoted(match)
            if not {quote, (-mean, -high, -low)} & known:
                line = text[: match.start()].count("\n") + 1
                yield f"{page.name}:{line}: {match[0]} follows from no answers and no values that are kept"


def means_table(table: Table) -> Iterator[str]:
    """Lines of Markdown: accuracy of each arm by kind of item, and tokens, in the mean of replicates."""
    keys = ("all", *EXPERIMENTS["modes"].kinds, "tokens")
    yield f"| mean of {len(table)} runs | {' | '.join(keys)} |"
    yield "|---" * (1 + len(keys)) + "|"
    for name, title in MODES_ARMS.items():
        if of := [arms[name] for arms in table.values() if name in arms]:
            means = [f"{statistics.mean(cells[key] for cells in of):.1f}" for key in keys]
            yield f"| {title} | {' | '.join(means)} |"


def _items(name: str) -> Path:
    return RESULTS / f"{name}-items.json.gz"


def _read(path: Path) -> list[dict[str, Any]]:
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def _accuracy(arms: dict[str, dict[str, float]], kinds: tuple[str, str], name: str) -> float:
    """Of an arm, of its answers to one kind of items, or in the mean of two arms."""
    names = [part.partition(":") for part in name.split(" + ")]
    return statistics.mean(arms[arm][kinds[int(kind) - 1] if kind else "all"] for arm, _, kind in names)


def _figures(differences: list[float]) -> tuple[Any, ...]:
    """Mean, lower and upper end, and p; the mean of one replicate alone, and nothing of none."""
    if not (interval := over_replicates(differences)):
        return (round(differences[0], 1), "", "", "") if differences else ("",) * 4
    ends = (statistics.mean(differences), interval.low, interval.high)
    return *(round(end, 1) + 0.0 for end in ends), float(f"{interval.p:.2g}")


def _quoted(match: re.Match[str]) -> tuple[float, ...]:
    """Mean, lower and upper end, to one decimal, as pages quote them."""
    return tuple(round(float(figure), 1) for figure in match.groups())


if __name__ == "__main__":
    main()
