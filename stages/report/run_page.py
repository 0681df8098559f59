"""The page of one run: what it brought, how it got there, and what it cost."""

from __future__ import annotations

import json
from typing import Any

from stages.config import REGIONS, Config
from stages.evaluation.metrics import accuracy_by_item, graded
from stages.evaluation.statistics import p_value
from stages.lora.training import curves
from stages.pipeline.state import state
from stages.pipeline.steps import Step
from stages.records import Sample, read_samples
from stages.report import comparison, elements, figures, provenance
from stages.report.page import (
    Command,
    ComparedItem,
    Grid,
    Items,
    PageSection,
    Part,
    Picture,
    Pictures,
    Text,
    render,
)
from stages.store.artifacts import Artifact, Store
from stages.sweep.formats import accuracy

SHOWN = 4
"""Won and lost items of each benchmark."""


def page(config: Config, steps: dict[str, Step], command: str) -> str:
    """command: what makes the steps that are missing."""
    lead, sections, missing = build(config, steps, Store(config.root))
    if missing:
        sections.append(
            PageSection(
                "missing", "Missing", [Text(f"Not made yet: {', '.join(missing)}."), Command(command)]
            )
        )
    return render(f"lorapar: {config.run}", lead, sections)


def build(
    config: Config, steps: dict[str, Step], store: Store
) -> tuple[list[str], list[PageSection], list[str]]:
    """Verdicts, all that there is to be seen, and the steps that are not current."""
    made = {
        name: now.artifact for name, step in steps.items() if (now := state(store, step)).state == "current"
    }
    found = {name: artifact for name, artifact in made.items() if artifact is not None}
    # Others may be made at this moment.
    evaluations = [step for name, step in steps.items() if step.stage.name == "eval" and name in found]
    tables = comparison.tables(store, evaluations, "system")
    missing = [name for name in steps if name not in found]
    sections = [
        PageSection("results", "Results", _results(tables)),
        PageSection("items", "Won and lost", _items(found, tables)),
        PageSection("training", "Training", _training(found)),
        PageSection("elements", "Elements", elements.parts(config, found)),
        PageSection("labels", "Labels", _labels(found)),
        PageSection("cost", "Cost", [provenance.cost(found)] if found else []),
        PageSection("settings", "Settings and versions", provenance.settings(config, found)),
    ]
    return _verdicts(tables), sections, missing


def _verdicts(tables: dict[str, list[dict[str, Any]]]) -> list[str]:
    """For each benchmark what the last training stage brought, with its test."""
    said = []
    for name, rows in tables.items():
        whole = [
            row for row in rows if row["group"] == "all" and row["target"] not in REGIONS and _graded(row)
        ]
        if len(whole) < 2:
            continue
        last, before = whole[-1], whole[-2]
        change = 100 * (last["accuracy"] - before["accuracy"])
        p = ""
        if last["p"] is not None:
            change = 100 * last["change"]
            p = f" (paired test over {last['tested']} items, {p_value(last['p'])})"
        said.append(
            f"{name}: {last['target']} answers {100 * last['accuracy']:.1f} % correctly, "
            f"{change:+.1f} points against {before['target']}{p}."
        )
    return said


def _results(tables: dict[str, list[dict[str, Any]]]) -> list[Part]:
    parts: list[Part] = []
    for name, rows in tables.items():
        if not rows:
            parts.append(Text(f"{name}: no graded answers; `lorapar show` has what the harness found."))
            continue
        targets = list(dict.fromkeys(row["target"] for row in rows))
        groups = list(dict.fromkeys(row["group"] for row in rows))
        by = {(row["group"], row["target"]): row for row in rows}
        lines = []
        for group in groups:
            number = max(row["n"] for row in rows if row["group"] == group)
            lines.append([group, str(number), *(_cell(by.get((group, target))) for target in targets)])
        for group in groups:
            written = [by.get((group, target), {}).get("tokens") for target in targets]
            if any(written):
                lines.append([f"tokens, {group}", "", *("–" if n is None else f"{n:.0f}" for n in written)])
        caption = "Accuracy in % [95 % interval over items]; p: paired test against the model to the left; "
        caption += "tokens: mean length of an answer."
        if set(targets) & set(REGIONS):
            caption += " Regions alone are tested against the model that they are of."
        if fewer := comparison.answered_fewer(rows):
            caption += f" On {name}, {fewer}"
        parts.append(Grid([name, "n", *targets], lines, caption))
        series = {
            target: {
                group: _mark(row) for group in groups if (row := by.get((group, target))) and _graded(row)
            }
            for target in targets
        }
        drawn = figures.svg(figures.dots(groups, series, {}))
        parts.append(
            Pictures([Picture(drawn, f"Accuracies on {name} with intervals, as in the table above.")])
        )
    return parts


def _graded(row: dict[str, Any]) -> bool:
    return row["accuracy"] is not None


def _mark(row: dict[str, Any]) -> figures.Mark:
    return 100 * row["accuracy"], 100 * row["low"], 100 * row["high"]


def _cell(row: dict[str, Any] | None) -> str:
    if row is None or not _graded(row):
        return "–"
    p = "" if row["p"] is None else f", {p_value(row['p'])}"
    return accuracy(row["accuracy"], row["low"], row["high"]) + p


def _items(found: dict[str, Artifact], tables: dict[str, list[dict[str, Any]]]) -> list[Part]:
    """Items that the last two targets of a benchmark answered unlike."""
    parts: list[Part] = []
    for name, rows in tables.items():
        targets = [name for name in dict.fromkeys(row["target"] for row in rows) if name not in REGIONS][-2:]
        if len(targets) < 2:
            continue
        earlier, later = (_answers(found[f"eval:{target}@{name}"]) for target in targets)
        parts += won_and_lost(f"{name}: ", (targets[0], earlier), (targets[1], later))
    return parts


Answers = dict[str, list[Sample]]
"""Of each item, those that count."""
STRICTLY = ("correct", "correct")


def won_and_lost(
    what: str, first: tuple[str, Answers], second: tuple[str, Answers], read: tuple[str, str] = STRICTLY
) -> list[Part]:
    """Items that two models, each with its title, answered unlike. what: before the sentence on them.

    read: the field of a sample that says whether it is right, of either.
    """
    (title, earlier), (other, later) = first, second
    less, more = accuracy_by_item(earlier, read[0]), accuracy_by_item(later, read[1])
    both = [item for item in more if item in less]
    won = [item for item in both if more[item] > less[item]]
    lost = [item for item in both if more[item] < less[item]]
    several = " by their shares of right answers" if any(len(later[item]) > 1 for item in both) else ""
    told = f"{what}{other} wins {len(won)} and loses {len(lost)} of {len(both)} items{several}."
    before, after = ({item: given[0] for item, given in part.items()} for part in (earlier, later))
    shown = [("won", item) for item in won[:SHOWN]] + [("lost", item) for item in lost[:SHOWN]]
    items = [
        ComparedItem(
            how,
            "" if after[i].system is None else f"System {after[i].system}",
            after[i].prompt.strip(),
            after[i].gold or "",
            title,
            before[i].output.strip(),
            other,
            after[i].output.strip(),
        )
        for how, i in shown
    ]
    return [Text(told), Items(items)]


def _answers(artifact: Artifact) -> Answers:
    """Those to each item that count."""
    return graded(list(read_samples(artifact.path / "samples.jsonl")))


def _training(found: dict[str, Artifact]) -> list[Part]:
    parts: list[Part] = []
    for name in ("sft", "rl"):
        if name not in found:
            continue
        history = json.loads((found[name].path / "history.json").read_text(encoding="utf-8"))
        drawn = figures.svg(figures.styled(curves.drawn)(history))
        text = f"Curves of {name} over {len(history)} steps: loss, lengths, and rewards where there are any."
        parts.append(Pictures([Picture(drawn, text, f"{name}, by optimizer step")]))
    return parts


def _labels(found: dict[str, Artifact]) -> list[Part]:
    parts: list[Part] = []
    for name, artifact in found.items():
        if not name.startswith("classify:"):
            continue
        counts = artifact.manifest["summary"]
        shown = {key: value for key, value in counts.items() if isinstance(value, int)}
        said = ", ".join(f"{value} {key.replace('_', ' ')}" for key, value in shown.items())
        parts.append(Text(f"{name.partition(':')[2]}: {said}."))
        file = artifact.path / "report.json"
        if not file.is_file():
            continue
        report = json.loads(file.read_text(encoding="utf-8"))
        rows = [
            [voter, str(v["valid"]), _percent(v["system2_share"]), _number(v["held_out_auc"])]
            for voter, v in report["voters"].items()
        ]
        parts.append(Grid(["voter", "votes", "votes 2", "AUC, held out"], rows))
        kappa = report.get("agreement", {}).get("fleiss_kappa")
        if kappa is not None:
            parts.append(Text(f"Agreement of the voters: Fleiss' kappa {kappa:.2f}.", quiet=True))
        if (known := report.get("known")) and known["n"]:
            low, high = known["interval"]
            areas = ", ".join(f"{title} {area[0]:.2f}" for title, area in known["auc"].items() if area)
            parts.append(
                Text(
                    f"Known labels ({known['field']}): {100 * known['agreement']:.0f} % agree "
                    f"[{100 * low:.0f}, {100 * high:.0f}] of {known['n']}. AUC by votes, by surface: "
                    f"{areas}.",
                    quiet=True,
                )
            )
    return parts


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.0f} %"
