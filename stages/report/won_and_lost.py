"""Items that one of two models answers better than the other."""

from __future__ import annotations

import os
import re
from typing import NamedTuple

from stages.evaluation.metrics import accuracy_by_item
from stages.records import Sample
from stages.report.page import Block, Command, ComparedItem, Details, Items, Text

MAX_ITEMS = 4
"""Most won, and most lost, items shown of a benchmark."""


class Answered(NamedTuple):
    """Graded answers of a model, with its title."""

    title: str
    answers: dict[str, list[Sample]]
    """Item → its graded answers."""
    read: str = "correct"
    """Field of a sample that says whether it is correct."""


def won_and_lost(prefix: str, first: Answered, second: Answered) -> list[Block]:
    """Show items that the second of two models answered better, or worse, than the first.

    prefix: begins the sentence that counts them.
    """
    baseline, accuracies = (accuracy_by_item(model.answers, model.read) for model in (first, second))
    items = [item for item in accuracies if item in baseline]
    won = [item for item in items if accuracies[item] > baseline[item]]
    lost = [item for item in items if accuracies[item] < baseline[item]]
    sampled = any(len(second.answers[item]) > 1 for item in items)
    by_shares = " by their shares of right answers" if sampled else ""
    counts = f"{second.title} wins {len(won)} and loses {len(lost)} of {len(items)} items{by_shares}."
    chosen = [("won", item) for item in won[:MAX_ITEMS]] + [("lost", item) for item in lost[:MAX_ITEMS]]
    if not chosen:
        return [Text(prefix + counts)]
    # Items of the two systems may have system messages of their own.
    frames = {
        system: _frame([s[0].prompt for s in second.answers.values() if s[0].system == system])
        for system in {second.answers[item][0].system for _, item in chosen}
    }
    compared = []
    for outcome, item in chosen:
        before, after = first.answers[item][0], second.answers[item][0]
        start, end = frames[after.system]
        label = "" if after.system is None else f"System {after.system}"
        question = after.prompt.removeprefix(start).removesuffix(end).strip()
        answers = first.title, before.output.strip(), second.title, after.output.strip()
        compared.append(ComparedItem(outcome, label, question, after.gold or "", *answers))
    blocks: list[Block] = [Items(compared)]
    for start in sorted({start for start, _ in frames.values() if start.strip()}):
        blocks += [Text("Not repeated above, the prompts begin with:", quiet=True), Command(start.strip())]
    shown = f"{min(len(won), MAX_ITEMS)} won and {min(len(lost), MAX_ITEMS)} lost items"
    return [Text(prefix + counts), Details(shown, blocks)]


def _frame(prompts: list[str]) -> tuple[str, str]:
    """Return what all prompts begin with, in whole lines, and what they end with, from a tag or a line on."""
    if len(set(prompts)) < 2:
        return "", ""
    common = os.path.commonprefix(prompts)
    start = common[: common.rfind("\n") + 1]
    rests = [prompt.removeprefix(start)[::-1] for prompt in prompts]
    end = re.search(r"[\n<\[].*", os.path.commonprefix(rests)[::-1], re.DOTALL)
    return start, end[0] if end else ""
