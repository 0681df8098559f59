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
from stages.records import Example, Journal
from stages.store.digests import key_of


@dataclass(frozen=True)
class Wanted:
    """One question to one voter: an example and the number of the sample."""

    example: Example
    sample: int


@dataclass(frozen=True)
class Said:
    system2: float | None
    """None: the reply was none of its words."""
    mass: float
    text: str


class Votes:
    """One voter's answers, journalled by ballot and sample; an answer in the journal is never asked for again.

    The journal belongs to what answers (model, engine, temperature, thought, arguments that change results) and to a persona;
    a line, to the text of one ballot. So other words or worked examples, or more samples, ask only for what is new.
    """

    def __init__(
        self, voter: Voter, title: str, model_title: str, identity: str, brief: Brief, seed: int, folder: Path
    ) -> None:
        self.voter, self.title = voter, title
        self.brief = brief
        self._persona, self._seed = personas.pick(voter.persona), seed
        how = {"thinking": voter.thinking and voter.thinking.max_tokens, "temperature": voter.temperature}
        key = key_of({"voter": identity, "engine": voter.engine, **{k: v for k, v in how.items() if v}})
        self._path = folder / f"{re.sub('[^A-Za-z0-9._-]', '-', model_title)}-{voter.persona}-{key}.jsonl"
        self._journal = Journal(self._path)
        self._fingerprint: list[str] | None = None
        self._said: dict[tuple[str, int], Said] = {}
        self._invalid: list[str] = []
        self._keys: dict[str, str] = {}
        self.failures: list[tuple[str, Failure]] = []
        """Example id and why, of questions without an answer."""
        self.asked = 0
        self._read()

    def _read(self) -> None:
        for row in self._journal.rows:
            if "fingerprint" in row:
                self._fingerprint = row["fingerprint"]
            else:  # a line that repeats an earlier one changes nothing
                said = Said(row["system2"], row["mass"], row.get("text", ""))
                if said == self._said.setdefault((row["ballot"], row["sample"]), said) and said.system2 is None:
                    self._invalid.append(said.text)
        self._journal.rows.clear()

    def missing(self, examples: Iterable[Example]) -> list[Wanted]:
        """The questions whose answer the journal lacks."""
        wanted = [Wanted(e, n) for e in examples for n in range(self.voter.samples)]
        return [w for w in wanted if (self._key(w.example), w.sample) not in self._said]

    def ask(self, examples: list[Example], engine: Engine, say: Callable[[str], None]) -> Iterator[None]:
        """Put what the journal lacks to the engine and journal each answer as it comes; yields after each.

        Other weights under the same name are noticed by their greedy answers, and earlier votes left aside.
        """
        # What runs here is known by the digest of its weights.
        probes = engine.fingerprint() if isinstance(engine, Client) and self.voter.urls else []
        if probes and self._fingerprint and not same_model(probes, self._fingerprint):
            say(
                f"{self.title} answers unlike before: other weights under the same name; "
                f"its {len(self._said)} earlier votes are left aside"
            )
            self._journal.close()
            self._path.replace(self._path.with_suffix(f".{key_of({'fingerprint': self._fingerprint})}.old"))
            self._journal, self._fingerprint = Journal(self._path), None
            self._said.clear()
            self._invalid.clear()
        if probes and self._fingerprint is None:
            self._journal.append({"fingerprint": probes})
            self._fingerprint = probes
        missing = self.missing(examples)
        for i, found in engine.choose(self._ballot(wanted) for wanted in missing):
            self._keep(missing[i], found)
            yield

    def _keep(self, wanted: Wanted, found: Choice | Failure) -> None:
        self.asked += 1
        if isinstance(found, Failure):
            self.failures.append((wanted.example.id, found))
            return
        said = Said(found.shares[1] if found.shares else None, found.mass, found.text)
        key = self._key(wanted.example)
        row: dict[str, Any] = {"ballot": key, "sample": wanted.sample, "example": wanted.example.id}
        row |= {"system2": said.system2, "mass": said.mass, **({"text": said.text} if said.text else {})}
        self._journal.append(row)
        self._said[key, wanted.sample] = said
        if said.system2 is None:
            self._invalid.append(said.text)

    def check(self, total: int, max_failed: float, max_invalid: float, patience: int = 0) -> None:
        """AnswerError if more of `total` answers failed, or were none of the words, than these shares allow (one at least).

        patience: so many more are let pass, to go on with the others before giving up.
        """

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
        key = self._key(example)
        said = [self._said[key, n].system2 for n in range(self.voter.samples) if (key, n) in self._said]
        valid = [value for value in said if value is not None]
        return sum(valid) / len(valid) if valid else None

    def invalid(self, examples: Iterable[Example]) -> int:
        """Answers that were none of its words."""
        return sum(
            said.system2 is None
            for e in examples
            for n in range(self.voter.samples)
            if (said := self._said.get((self._key(e), n)))
        )

    def mass(self) -> float | None:
        """Mean probability of the label words among all tokens, where the engine could tell."""
        known = [said.mass for said in self._said.values() if said.mass >= 0]
        return sum(known) / len(known) if known else None

    def close(self) -> None:
        self._journal.close()

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
