"""Chooses a mode for a question, by one signal or the mean of several (see `eval.router`).

A signal is a number from 0 to 1 that is higher where the slow mode is needed. The mode is slow above a
threshold, which is found on rows that both modes have answered or, for the base's vote, on labelled rows.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

from stages.config import (
    CHOICE,
    MODES,
    ClassifySection,
    ModelSection,
    PromptSection,
    RouterSection,
    Voter,
)
from stages.engines import ChoiceRequest, Engine
from stages.evaluation.routing import Tuning
from stages.labelling.aggregate import calibrate
from stages.labelling.agreement import CHANCE
from stages.labelling.personas import question_of
from stages.labelling.votes import VoteJournal
from stages.progress import Progress
from stages.prompts.renderer import Renderer
from stages.records import Example, Labelled, examples_of_system

log = logging.getLogger(__name__)

ROWS = 64
"""Most training rows of each system that the threshold of a vote is found on."""
CHOOSE_ANOTHER = "another persona for it is the first of classify.voters, steps, effort or simplicity"
PERSONA = "steps"
"""Persona of the router if no voter is the base model itself."""


@dataclass(frozen=True)
class Threshold:
    """Where the slow mode begins, and on what that was found."""

    threshold: float
    method: str
    """`labels` of training rows, `answers` of both modes to the rows of `tune`, or `none`."""
    examples: int = 0
    auc: float | None = None
    """How well the signal tells the labels apart, by method `labels`."""
    accuracy: float | None = None
    """Of auto on the rows of `tune`, by method `answers`."""
    tokens: float | None = None
    """The same: tokens of an answer, as a share of the slow mode's."""


class Router:
    """Chooses between the modes. Before any choice: `set_questions`, `collect`, `find_threshold`."""

    def __init__(
        self, settings: RouterSection, journals: dict[str, VoteJournal], labels: list[Labelled], seed: int
    ) -> None:
        """journals: of the signals `vote` and `choice`. labels: of the training rows."""
        self.settings, self.journals = settings, journals
        by_labels = "vote" in journals and not settings.tune
        systems = (1, 2) if by_labels else ()
        self._rows = [row for system in systems for row in _sample(labels, system, seed)]
        self.threshold = Threshold(0.5, "none")

    def set_questions(self, examples: list[Example]) -> None:
        """Set what will be asked: the rows for the threshold, and these."""
        for journal in self.journals.values():
            journal.set_examples([*(row.example for row in self._rows), *examples])

    def collect(
        self, engine: Callable[[str], Engine], progress: Progress, title: str, limits: ClassifySection
    ) -> None:
        """Ask for what the journals lack; a signal's engine is started only if something is missing.

        limits: has the shares of failed and of invalid answers that are borne, else an AnswerError.
        """
        for signal, journal in self.journals.items():
            if missing := journal.missing():
                started = engine(signal)
                progress.start(title, len(missing))
                for _ in journal.ask(started, progress.say):
                    progress.advance(1)
            journal.check(limits.max_failed, limits.max_invalid)

    def find_threshold(self, tuning: Tuning | None) -> None:
        """Find the threshold: on items that both modes have answered, else on the labelled rows if any."""
        if tuning:
            signals = {item.id: self.system2(item) for item in tuning.items}
            self.threshold = best_threshold(signals, tuning, self.settings.tokens)
        elif self._rows:
            votes = [self.system2(row.example) for row in self._rows]
            measured = calibrate("held_out", self._rows, votes, [])
            self.threshold = Threshold(measured.threshold, "labels", measured.examples, measured.auc)
            if measured.interval and measured.interval[0] <= CHANCE:
                persona = self.journals["vote"].voter.persona
                area = f"AUC {measured.auc:.2f}, {CHANCE} is chance"
                log.warning(
                    "auto: the vote of %s hardly tells the systems apart: %s; %s",
                    persona, area, CHOOSE_ANOTHER,
                )  # fmt: skip

    def system2(self, example: Example) -> float | None:
        """The mean of the signals on an item; None if one is missing, as after an invalid vote."""
        signals = [journal.vote(example) for journal in self.journals.values()]
        valid = [signal for signal in signals if signal is not None]
        return fmean(valid) if len(valid) == len(signals) else None

    def mode(self, system2: float | None) -> str:
        """Return `fast` or `slow` for a signal; slow if there is none."""
        return MODES[system2 is None or system2 > self.threshold.threshold]

    def summary(self) -> str:
        """One line on what `auto` decides by, and what it will cost."""
        threshold, by = self.threshold, " and ".join(self.settings.by)
        line = f"auto: slow where {by} is above {threshold.threshold:.3f}"
        if threshold.accuracy is not None:
            line += f"; on {threshold.examples} rows that is {100 * threshold.accuracy:.1f} % right"
            line += f" with {100 * (threshold.tokens or 0):.0f} % of the slow mode's tokens"
        elif threshold.auc is not None:
            line += f", AUC {threshold.auc:.2f} on {threshold.examples} labelled training rows"
        return line

    def record(self) -> dict[str, Any]:
        """The router in a report: its signals, its threshold, and what that was found on."""
        persona = {"persona": vote.voter.persona} if (vote := self.journals.get("vote")) else {}
        return {"by": self.settings.by, **persona, **asdict(self.threshold)}


def best_threshold(
    signals: Mapping[str, float | None], tuning: Tuning, most_tokens: float | None
) -> Threshold:
    """Return the threshold with the highest accuracy on these items, and of equals that with fewest tokens.

    signals: by item id; an item without one is answered slowly. most_tokens: as a share of the slow mode's;
    if no threshold keeps to it, all items that can are answered fast.
    """
    fast, slow = tuning.fast, tuning.slow
    answers = [(slow if signal is None else fast)[id] for id, signal in signals.items()]
    # Exact sums, so that an item that moves from fast to slow leaves no rounding error behind.
    right, tokens = (sum(map(Fraction, values), Fraction()) for values in zip(*answers, strict=True))
    all_tokens = sum(slow[id][1] for id in signals) or 1.0
    waiting = sorted((signal, id) for id, signal in signals.items() if signal is not None)  # the last is next
    ordered = sorted({signal for signal, _ in waiting}, reverse=True)
    # From all items fast to all slow: a threshold is halfway between two neighbours, or at an end.
    candidates = []
    for threshold in [1.0, *((above + below) / 2 for above, below in pairwise(ordered)), 0.0]:
        while waiting and waiting[-1][0] > threshold:
            _, id = waiting.pop()
            right += Fraction(slow[id][0]) - Fraction(fast[id][0])
            tokens += Fraction(slow[id][1]) - Fraction(fast[id][1])
        candidates.append((float(right) / len(signals), -float(tokens) / all_tokens, threshold))
    cheap = [candidate for candidate in candidates if most_tokens is None or -candidate[1] <= most_tokens]
    accuracy, share, threshold = max(cheap or candidates[:1])
    return Threshold(threshold, "answers", len(signals), accuracy=accuracy, tokens=-share)


def build_router(
    settings: RouterSection,
    classify: ClassifySection,
    model: ModelSection,
    prompt: PromptSection,
    engine: str,
    identities: Mapping[str, str],
    labels: list[Labelled],
    folder: Path,
) -> Router:
    """The router of these settings, with a journal of each signal that is asked for.

    prompt: with which the fast mode learned to choose. identities: signal → what tells the model that is
    asked, the base for `vote` and the fast mode for `choice`, from others. labels: of the training rows.
    folder: of all journals.
    """
    journals = {}
    if "vote" in settings.by:
        journals["vote"] = vote_journal(classify, model, engine, identities["vote"], folder)
    if "choice" in settings.by:
        from stages.models.tokenizer import load_tokenizer

        renderer = Renderer(load_tokenizer(model), prompt, system=CHOICE)
        journals["choice"] = _choice_journal(renderer, model, engine, identities["choice"], folder)
    return Router(settings, journals, labels, classify.seed)


def vote_journal(
    classify: ClassifySection, model: ModelSection, engine: str, identity: str, folder: Path
) -> VoteJournal:
    """The base's answers to a voter's question. identity: what tells the model from others."""
    voter = router_voter(classify).model_copy(update={"engine": engine})
    question = question_of(voter, model.title, show_answer=False)
    return VoteJournal(
        voter, f"router/{voter.persona}", model.title, identity, question, classify.seed, folder / "votes"
    )


def _choice_journal(
    renderer: Renderer, model: ModelSection, engine: str, identity: str, folder: Path
) -> VoteJournal:
    """The words that the fast mode's adapter says under `prompt.choice`."""

    def question(example: Example) -> ChoiceRequest:
        return ChoiceRequest(renderer.ids(renderer.prompt(example.prompt, example=example)), MODES)

    voter = Voter(persona=PERSONA, engine=engine).model_copy(update={"persona": "choice"})
    return VoteJournal(voter, "router/choice", model.title, identity, question, 0, folder / "votes")


def router_voter(classify: ClassifySection) -> Voter:
    """The first voter that is the base model, asked once and greedily, or one with persona PERSONA."""
    own = [voter for voter in classify.voters if not voter.model and not voter.urls]
    voter = own[0] if own else Voter(persona=PERSONA)
    return voter.model_copy(update={"thinking": None, "temperature": 0.0, "samples": 1})


def _sample(labels: list[Labelled], system: int, seed: int) -> list[Labelled]:
    examples = examples_of_system(labels, system)
    chosen = random.Random(f"{seed} router {system}").sample(examples, min(ROWS, len(examples)))
    return [Labelled(example, system, {}) for example in chosen]
