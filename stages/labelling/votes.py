"""The votes of one voter: those in its journal, the requests that are missing there, and the failures."""

import re
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, Field

from stages.config import Voter
from stages.engines import ChoiceRequest, Engine, Failure
from stages.errors import AnswerError
from stages.records import Example
from stages.store.digests import key_of, seed_of
from stages.store.journal import Journal

MAX_INVALID = 0.1
"""Share of a voter's answers that may be none of its label words."""
VoteRequest = tuple[Example, int]
"""One vote to ask for: an example and the number of the sample."""


class Vote(BaseModel):
    """One answer in the journal."""

    example: str
    system2: Annotated[float, Field(ge=0, le=1 + 1e-6)] | None
    """Probability of System 2; None if the answer was none of the words."""
    text: str = ""


def tolerated(total: int, share: float) -> float:
    """The number of bad answers among `total` that a share allows; one above 0 allows at least one."""
    return max(1, share * total) if share else 0


def journal_path(folder: Path, model_title: str, persona: str, key: str) -> Path:
    """The file of a voter's journal. key: of all that changes its answers, or `*` for a pattern."""
    model_name = re.sub("[^A-Za-z0-9._-]", "-", model_title)
    return folder / f"{model_name}-{persona}-{key}.jsonl"


class VoteJournal:
    """One voter's answers, journalled by prompt and sample; no request in the journal is repeated.

    The file of a journal is named by the persona and a key of all that changes answers: model, data type,
    engine, temperature, thinking budget and engine arguments. The key of a line is the text and the label
    words of the prompt. So with other label words, other worked examples or more samples, only new requests
    are made. The same holds for another run with the same voter.
    """

    def __init__(
        self,
        voter: Voter,
        title: str,
        model_title: str,
        identity: str,
        question: Callable[[Example], ChoiceRequest],
        seed: int,
        folder: Path,
    ) -> None:
        """identity: names the model and all that changes its answers, except for the settings of `voter`.

        question: makes the prompt for an example, whose second word stands for System 2.
        """
        self.voter, self.title, self.question = voter, title, question
        self._seed = seed
        sampling = {
            "thinking": voter.thinking and voter.thinking.max_tokens,
            "temperature": voter.temperature,
            "seed": f"seed {seed}" if voter.temperature else None,
        }
        key = key_of({"voter": identity, "engine": voter.engine, **{k: v for k, v in sampling.items() if v}})
        self._journal = Journal(journal_path(folder, model_title, voter.persona, key), Vote)
        self._keys: dict[str, str] = {}
        self.examples: list[Example] = []
        """The examples to vote on."""
        self.failures: list[tuple[str, Failure]] = []
        """Example id and reason for each request that got no answer."""

    @property
    def path(self) -> Path:
        """Voters with one path share their votes: nothing in their settings tells their models apart."""
        return self._journal.path

    def set_examples(self, examples: list[Example]) -> None:
        self.examples = examples
        answers = self._answers(examples)
        self._invalid = [answer.get("text", "") for answer in answers if answer["system2"] is None]

    def missing(self) -> list[VoteRequest]:
        """The requests whose answers are not in the journal; equal prompts are requested once."""
        requests: dict[tuple[str, int], VoteRequest] = {}
        for example, sample in product(self.examples, range(self.voter.samples)):
            requests.setdefault((self._key(example), sample), (example, sample))
        return [request for key, request in requests.items() if key not in self._journal]

    def ask(self, engine: Engine, say: Callable[[str], None]) -> Generator[None, None, None]:
        """Send the engine the missing requests and journal each answer as it arrives; yields after each."""
        with self._journal.writing(say):
            self.set_examples(self.examples)  # another run may have added answers
            missing = self.missing()
            for i, result in engine.choose_words(self._choice_request(*request) for request in missing):
                example, sample = missing[i]
                if isinstance(result, Failure):  # it is not journalled, so the next run asks again
                    self.failures.append((example.id, result))
                else:
                    system2 = result.probabilities[1] if result.probabilities else None
                    text = {"text": result.text} if result.text else {}
                    answer = {"example": example.id, "system2": system2, **text}
                    self._journal.add((self._key(example), sample), answer)
                    if system2 is None:
                        self._invalid.append(result.text)
                yield

    def check(self, max_failed: float, patience: int = 0) -> None:
        """Raise AnswerError if more requests failed than this share, or more answers are none of the words.

        patience: this many more are allowed while votes still arrive.
        """
        total = len(self.examples) * self.voter.samples
        if len(self.failures) > patience + tolerated(total, max_failed):
            id, failure = self.failures[0]
            raise AnswerError(
                f"{self.title} could not answer {len(self.failures)} of {total} questions; "
                f"first {id}: {failure.reason}: {failure.detail}",
                "its other votes are kept; run it again, or allow more: classify.max_failed",
            )
        if len(self._invalid) > patience + tolerated(total, MAX_INVALID):
            raise AnswerError(
                f"{self.title}: {len(self._invalid)} of {total} answers are none of its words, "
                f"e.g. {self._invalid[0]!r}",
                "another persona, or other words",
            )

    def vote(self, example: Example) -> float | None:
        """Mean probability of System 2 over the example's valid samples; None if there is none."""
        valid = [answer["system2"] for answer in self._answers([example]) if answer["system2"] is not None]
        return sum(valid) / len(valid) if valid else None

    def invalid(self, examples: Iterable[Example]) -> int:
        """The number of answers that are none of the voter's words."""
        return sum(answer["system2"] is None for answer in self._answers(examples))

    def _answers(self, examples: Iterable[Example]) -> Iterator[dict[str, Any]]:
        """The journalled answers on these examples."""
        for example, sample in product(examples, range(self.voter.samples)):
            if (question := (self._key(example), sample)) in self._journal:
                yield self._journal[question]

    def _choice_request(self, example: Example, sample: int) -> ChoiceRequest:
        return replace(
            self.question(example),
            max_thinking_tokens=self.voter.thinking.max_tokens if self.voter.thinking else 0,
            temperature=self.voter.temperature,
            seed=seed_of({"question": self._key(example), "seed": self._seed, "sample": sample}),
        )

    def _key(self, example: Example) -> str:
        """The digest of the rendered prompt: the example's id would not change with the persona's text."""
        if example.id not in self._keys:
            choice_request = self.question(example)
            self._keys[example.id] = key_of({"text": choice_request.text, "words": choice_request.words})
        return self._keys[example.id]
