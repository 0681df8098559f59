"""The votes of one voter: those in its journal, the questions still to be asked, and the failures."""

from __future__ import annotations

import re
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, Field

from stages.config import Voter
from stages.engines import ChoiceRequest, ChoiceResult, Engine, Failure, same_model
from stages.engines.openai.client import Client
from stages.errors import AnswerError
from stages.labelling.personas import PersonaContext, is_judged, personas
from stages.records import Example
from stages.store.digests import key_of, seed_of
from stages.store.journal import Journal


@dataclass(frozen=True)
class VoteRequest:
    """One question to one voter: an example and the number of the sample."""

    example: Example
    sample: int


class Vote(BaseModel):
    """One answer in the journal."""

    example: str
    system2: Annotated[float, Field(ge=0, le=1 + 1e-6)] | None
    """Probability of System 2; None if the answer was none of the words."""
    mass: Annotated[float, Field(ge=-1, le=1 + 1e-3)]
    text: str = ""


class VoterLog:
    """One voter's answers, journalled by ballot and sample; no question in the journal is asked again.

    A journal belongs to one persona and to one way of answering: model, data type, engine, temperature,
    length of thought, and arguments that change results. Each of its lines belongs to the text of one ballot.
    So with other label words, other worked examples or more samples, only the new questions are asked. The
    same holds for another run with the same voter.
    """

    def __init__(
        self,
        voter: Voter,
        title: str,
        model_title: str,
        identity: str,
        brief: PersonaContext,
        seed: int,
        folder: Path,
    ) -> None:
        """identity: identifies the model and everything else that changes its answers."""
        self.voter, self.title = voter, title
        self.brief = brief
        self._persona, self._seed = personas.pick(voter.persona), seed
        how = {
            "thinking": voter.thinking and voter.thinking.max_tokens,
            "temperature": voter.temperature,
            "seed": f"seed {seed}" if voter.temperature else None,
        }
        key = key_of({"voter": identity, "engine": voter.engine, **{k: v for k, v in how.items() if v}})
        model_name = re.sub("[^A-Za-z0-9._-]", "-", model_title)
        self._journal = Journal(folder / f"{model_name}-{voter.persona}-{key}.jsonl", Vote)
        self._keys: dict[str, str] = {}
        self._invalid: list[str] = []
        self.examples: list[Example] = []
        """The examples to vote on."""
        self.failures: list[tuple[str, Failure]] = []
        """Example id and reason for each question that got no answer."""

    def same_journal(self, other: VoterLog) -> bool:
        """Whether both keep their answers in one journal: they are one model, for all that was said."""
        return self._journal.path == other._journal.path

    def take(self, examples: list[Example]) -> None:
        """Set the examples to vote on."""
        self.examples = examples
        self._count()

    def _count(self) -> None:
        self._invalid = [answer.get("text", "") for answer in self._answers() if answer["system2"] is None]

    def missing(self) -> list[VoteRequest]:
        """The questions whose answers are not in the journal."""
        wanted: dict[tuple[str, int], VoteRequest] = {}
        for example in self.examples:
            for sample in range(self.voter.samples):
                question = (self._key(example), sample)
                if question not in self._journal:
                    wanted.setdefault(
                        question, VoteRequest(example, sample)
                    )  # equal questions are asked once
        return list(wanted.values())

    def ask(self, engine: Engine, say: Callable[[str], None]) -> Generator[None, None, None]:
        """Ask the engine the missing questions and journal each answer as it arrives; yields after each.

        If a remote model gives other greedy answers than before, its weights have changed under the same
        name: its earlier votes are then left aside.
        """
        # Models that run here are identified by the digest of their weights, so they need no probes.
        probes = engine.fingerprint() if isinstance(engine, Client) and self.voter.urls else []
        with self._journal.writing(say):
            known = self._journal.notes.get("fingerprint")
            if not isinstance(known, list) or len(known) != len(probes):
                known = None
            if probes and known and not same_model(probes, known):
                number = self._journal.set_aside()
                say(
                    f"{self.title} answers unlike before: other weights under the same name; "
                    f"its {number} earlier votes are left aside"
                )
                known = None
            if probes and known is None:
                self._journal.note("fingerprint", probes)
            self._count()  # others may have answered meanwhile
            missing = self.missing()
            for i, found in engine.choose(self._ballot(wanted) for wanted in missing):
                self._keep(missing[i], found)
                yield

    def _keep(self, wanted: VoteRequest, found: ChoiceResult | Failure) -> None:
        if isinstance(found, Failure):
            self.failures.append((wanted.example.id, found))
            return
        system2 = found.probabilities[1] if found.probabilities else None
        answer = {"example": wanted.example.id, "system2": system2, "mass": found.mass}
        if found.text:
            answer["text"] = found.text
        self._journal.keep((self._key(wanted.example), wanted.sample), answer)
        if system2 is None:
            self._invalid.append(found.text)

    def check(self, max_failed: float, max_invalid: float, patience: int = 0) -> None:
        """AnswerError if more questions failed, or more answers are no label word, than these shares allow.

        A share above 0 allows at least one. patience: the number of further ones allowed before giving up.
        """
        total = len(self.examples) * self.voter.samples

        def too_many(number: int, share: float) -> bool:
            return number > patience + (max(1, share * total) if share else 0)

        if too_many(len(self.failures), max_failed):
            id, failure = self.failures[0]
            raise AnswerError(
                f"{self.title} could not answer {len(self.failures)} of {total} questions; "
                f"first {id}: {failure.reason}: {failure.detail}",
                "its other votes are kept; run it again, or allow more: classify.max_failed",
            )
        if too_many(len(self._invalid), max_invalid):
            raise AnswerError(
                f"{self.title}: {len(self._invalid)} of {total} answers are none of its words, "
                f"e.g. {self._invalid[0]!r}",
                "another persona or words, or allow more: classify.max_invalid",
            )

    def vote(self, example: Example) -> float | None:
        """Mean probability of System 2 over the example's valid samples; None if there is none."""
        valid = [answer["system2"] for answer in self._answers([example]) if answer["system2"] is not None]
        return sum(valid) / len(valid) if valid else None

    def invalid(self, examples: Iterable[Example]) -> int:
        """The number of answers that are none of the voter's words."""
        return sum(answer["system2"] is None for answer in self._answers(examples))

    def mass(self) -> float | None:
        """Mean probability of the label words among all tokens; None where the engine cannot tell it."""
        known = [answer["mass"] for answer in self._answers() if answer["mass"] >= 0]
        return sum(known) / len(known) if known else None

    def _answers(self, examples: Iterable[Example] | None = None) -> Iterator[dict[str, Any]]:
        """The journalled answers on these examples, by default on all examples to vote on."""
        for example in self.examples if examples is None else examples:
            for sample in range(self.voter.samples):
                answer = self._journal.get((self._key(example), sample))
                if answer is not None:
                    yield answer

    def _ballot(self, wanted: VoteRequest) -> ChoiceRequest:
        ballot: ChoiceRequest = self._persona(wanted.example, self.brief)
        ballot = replace(ballot, measure_mass=is_judged(wanted.example))
        if self.voter.thinking or self.voter.temperature:
            thought = self.voter.thinking.max_tokens if self.voter.thinking else 0
            asked = {"question": self._key(wanted.example), "seed": self._seed, "sample": wanted.sample}
            seed = seed_of(asked)
            ballot = replace(
                ballot, max_thinking_tokens=thought, temperature=self.voter.temperature, seed=seed
            )
        return ballot

    def _key(self, example: Example) -> str:
        """The digest of the question as asked; the example's id would not change with the persona's text."""
        if example.id not in self._keys:
            ballot: ChoiceRequest = self._persona(example, self.brief)
            self._keys[example.id] = key_of({"text": ballot.text, "words": ballot.words})
        return self._keys[example.id]
