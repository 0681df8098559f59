"""The votes of one voter: what its journal has, what is still to be asked, and what came of it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from stages.config import Voter
from stages.engines import Ballot, Choice, Engine, Failure, same_model
from stages.engines.openai import Client
from stages.errors import AnswerError
from stages.labelling.personas import Brief, is_judged, personas
from stages.records import Example
from stages.store.digests import key_of
from stages.store.journal import Journal


@dataclass(frozen=True)
class Wanted:
    """One question to one voter: an example and the number of the sample."""

    example: Example
    sample: int


class Votes:
    """One voter's answers, journalled by ballot and sample; an answer in the journal is never asked for again.

    The journal belongs to what answers (model, its type here, engine, temperature, thought, arguments that change results)
    and to a persona; a line, to the text of one ballot. So other words or worked examples, or more samples, ask only for
    what is new, and so does another run with the same voter.
    """

    def __init__(
        self, voter: Voter, title: str, model_title: str, identity: str, brief: Brief, seed: int, folder: Path
    ) -> None:
        """identity: of the model, with all that changes its answers."""
        self.voter, self.title = voter, title
        self.brief = brief
        self._persona, self._seed = personas.pick(voter.persona), seed
        how = {"thinking": voter.thinking and voter.thinking.max_tokens, "temperature": voter.temperature}
        key = key_of({"voter": identity, "engine": voter.engine, **{k: v for k, v in how.items() if v}})
        self._journal = Journal(
            folder / f"{re.sub('[^A-Za-z0-9._-]', '-', model_title)}-{voter.persona}-{key}.jsonl"
        )
        self._keys: dict[str, str] = {}
        self._invalid: list[str] = []
        self.examples: list[Example] = []
        """What it is to vote on."""
        self.failures: list[tuple[str, Failure]] = []
        """Example id and why, of questions without an answer."""
        self.asked = 0

    def take(self, examples: list[Example]) -> None:
        """Set what it is to vote on."""
        self.examples = examples
        self._invalid = [answer.get("text", "") for answer in self._answers() if answer["system2"] is None]

    def missing(self) -> list[Wanted]:
        """The questions whose answer the journal lacks."""
        wanted = [Wanted(e, n) for e in self.examples for n in range(self.voter.samples)]
        return [w for w in wanted if (self._key(w.example), w.sample) not in self._journal]

    def ask(self, engine: Engine, say: Callable[[str], None]) -> Iterator[None]:
        """Put what the journal lacks to the engine and journal each answer as it comes; yields after each.

        Other weights under the same name are noticed by their greedy answers, and earlier votes left aside.
        """
        # What runs here is known by the digest of its weights.
        probes = engine.fingerprint() if isinstance(engine, Client) and self.voter.urls else []
        with self._journal.writing(say):
            known = self._journal.notes.get("fingerprint")
            if probes and known and not same_model(probes, known):
                number = self._journal.set_aside(key_of({"fingerprint": known}))
                say(
                    f"{self.title} answers unlike before: other weights under the same name; "
                    f"its {number} earlier votes are left aside"
                )
                self._invalid.clear()
                known = None
            if probes and known is None:
                self._journal.note("fingerprint", probes)
            missing = self.missing()
            for i, found in engine.choose(self._ballot(wanted) for wanted in missing):
                self._keep(missing[i], found)
                yield

    def _keep(self, wanted: Wanted, found: Choice | Failure) -> None:
        self.asked += 1
        if isinstance(found, Failure):
            self.failures.append((wanted.example.id, found))
            return
        system2 = found.shares[1] if found.shares else None
        answer = {"example": wanted.example.id, "system2": system2, "mass": found.mass}
        self._journal.keep(
            (self._key(wanted.example), wanted.sample),
            {**answer, **({"text": found.text} if found.text else {})},
        )
        if system2 is None:
            self._invalid.append(found.text)

    def check(self, max_failed: float, max_invalid: float, patience: int = 0) -> None:
        """AnswerError if more answers failed, or were none of the words, than these shares allow (one at least).

        patience: so many more are let pass, to go on with the others before giving up.
        """
        total = len(self.examples)

        def too_many(number: int, share: float) -> bool:
            return number > patience + (max(1, share * total) if share else 0)

        if too_many(len(self.failures), max_failed):
            id, failure = self.failures[0]
            raise AnswerError(
                f"{self.title} could not answer {len(self.failures)} of {total} questions; first {id}: {failure.reason}: "
                f"{failure.detail}",
                "its other votes are kept; run it again, or allow more: classify.max_failed",
            )
        if too_many(len(self._invalid), max_invalid):
            raise AnswerError(
                f"{self.title}: {len(self._invalid)} of {total} answers are none of its words, e.g. {self._invalid[0]!r}",
                "another persona or words, or allow more: classify.max_invalid",
            )

    def vote(self, example: Example) -> float | None:
        """Mean probability of System 2 over its valid samples."""
        valid = [answer["system2"] for answer in self._answers([example]) if answer["system2"] is not None]
        return sum(valid) / len(valid) if valid else None

    def invalid(self, examples: Iterable[Example]) -> int:
        """Answers that were none of its words."""
        return sum(answer["system2"] is None for answer in self._answers(examples))

    def mass(self) -> float | None:
        """Mean probability of the label words among all tokens, where the engine could tell."""
        known = [answer["mass"] for answer in self._answers() if answer["mass"] >= 0]
        return sum(known) / len(known) if known else None

    def _answers(self, examples: Iterable[Example] | None = None) -> Iterator[dict[str, Any]]:
        """What the journal has on these examples, or on all that it is to vote on."""
        for example in self.examples if examples is None else examples:
            for sample in range(self.voter.samples):
                answer = self._journal.get((self._key(example), sample))
                if answer is not None:
                    yield answer

    def _ballot(self, wanted: Wanted) -> Ballot:
        ballot: Ballot = self._persona(wanted.example, self.brief)
        ballot = replace(ballot, weigh=is_judged(wanted.example))
        if self.voter.thinking or self.voter.temperature:
            thought = self.voter.thinking.max_tokens if self.voter.thinking else 0
            seed = int(self._key(wanted.example), 16) % 2**31 + self._seed + wanted.sample
            ballot = replace(ballot, thought=thought, temperature=self.voter.temperature, seed=seed)
        return ballot

    def _key(self, example: Example) -> str:
        """The digest of what is asked, not the example's id alone: another persona text asks anew."""
        if example.id not in self._keys:
            ballot: Ballot = self._persona(example, self.brief)
            self._keys[example.id] = key_of({"text": ballot.text, "words": ballot.words})
        return self._keys[example.id]
