"""Chooses a mode for a question: the base model votes on it once, as a voter of `classify` does.

At serving time there is no reference answer to show, so the threshold of the labels does not apply. A new
one is found on labelled training rows, by the calibration that voters have.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from stages.config import ClassifySection, ModelSection, Voter
from stages.engines import ChoiceRequest, Engine
from stages.labelling.aggregate import Calibration, calibrate
from stages.labelling.agreement import CHANCE
from stages.labelling.personas import persona_context, personas
from stages.labelling.votes import VoteJournal
from stages.progress import Progress
from stages.records import Example, Labelled, examples_of_system

log = logging.getLogger(__name__)

ROWS = 64
"""Most training rows of each system that the threshold is found on."""
CHOOSE_ANOTHER = "another persona for it is the first of classify.voters, e.g. [{persona: steps}]"
PERSONA = "steps"
"""Persona of the router if no voter is the base model itself."""


class Router:
    """The votes that decide between the modes. Before any decision, `collect` votes, then `calibrate`."""

    def __init__(
        self,
        classify: ClassifySection,
        model: ModelSection,
        engine: str,
        identity: str,
        labels: list[Labelled],
        journals: Path,
    ) -> None:
        """labels: of the training rows. identity: what tells the model from others, as in VoteJournal."""
        voter = router_voter(classify).model_copy(update={"engine": engine})
        context = persona_context(voter, model.title, show_answer=False)
        title, folder = f"router/{voter.persona}", journals / "votes"
        self.journal = VoteJournal(voter, title, model.title, identity, context, classify.seed, folder)
        self._rows = [row for system in (1, 2) for row in _sample(labels, system, classify.seed)]
        self.calibration: Calibration

    def set_questions(self, examples: list[Example]) -> None:
        """Set what will be asked: the rows for the threshold, and these."""
        self.journal.set_examples([*(row.example for row in self._rows), *examples])

    def collect(self, engine: Callable[[], Engine], progress: Progress, title: str = "votes") -> None:
        """Ask for the votes that the journal lacks; the engine is started only if there are any."""
        if missing := self.journal.missing():
            base = engine()
            progress.start(title, len(missing))
            for _ in self.journal.ask(base, progress.say):
                progress.advance(1)

    def calibrate(self) -> Calibration:
        """Find the threshold, once the rows for it have their votes; its AUC is measured on the same rows."""
        votes = [self.journal.vote(row.example) for row in self._rows]
        measured = self.calibration = calibrate("held_out", self._rows, votes, [])
        if measured.interval and measured.interval[0] <= CHANCE:
            persona, area = self.journal.voter.persona, f"AUC {measured.auc:.2f}, {CHANCE} is chance"
            log.warning(
                "auto: the vote of %s hardly tells the systems apart: %s; %s", persona, area, CHOOSE_ANOTHER
            )
        return measured

    def request(self, example: Example) -> ChoiceRequest:
        """The vote on a question, to be sent to the base."""
        persona = personas.pick(self.journal.voter.persona)
        return persona(example, self.journal.context)  # type: ignore[no-any-return]

    def mode(self, system2: float | None) -> str:
        """Return `fast` or `slow` for a probability of System 2; slow if the vote was invalid."""
        return "fast" if system2 is not None and system2 <= self.calibration.threshold else "slow"

    def summary(self) -> str:
        """One line on what `auto` decides by."""
        measured = self.calibration
        area = "" if measured.auc is None else f", AUC {measured.auc:.2f}"
        question = f"auto: the base is asked once ({self.journal.voter.persona})"
        rows = f"on {measured.examples} labelled training rows"
        return f"{question}; slow above {measured.threshold:.3f}{area} {rows}"

    def record(self) -> dict[str, Any]:
        """The router in a report: its voter, its threshold, and how well it tells the labels apart."""
        return {"persona": self.journal.voter.persona, **asdict(self.calibration)}


def router_voter(classify: ClassifySection) -> Voter:
    """The first voter that is the base model, asked once and greedily, or one with persona PERSONA."""
    own = [voter for voter in classify.voters if not voter.model and not voter.urls]
    voter = own[0] if own else Voter(persona=PERSONA)
    return voter.model_copy(update={"thinking": None, "temperature": 0.0, "samples": 1})


def _sample(labels: list[Labelled], system: int, seed: int) -> list[Labelled]:
    examples = examples_of_system(labels, system)
    chosen = random.Random(f"{seed} router {system}").sample(examples, min(ROWS, len(examples)))
    return [Labelled(example, system, {}) for example in chosen]
