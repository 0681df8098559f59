"""The answers of one evaluation: those in the journal, those still to be asked for, and each one as text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from stages.config import BenchmarkSection
from stages.engines import ChoiceRequest, Engine, Failure, GenerateRequest, Sampling
from stages.engines.openai.schema import TokenId
from stages.errors import AnswerError, ArtifactError
from stages.prompts.renderer import Asked
from stages.store.artifacts import AWAY
from stages.store.digests import key_of, seed_of
from stages.store.journal import Journal

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from stages.progress import Progress
    from stages.prompts.renderer import Renderer


@dataclass(frozen=True)
class AnswerText:
    """The text of an answer, as it is graded."""

    text: str
    complete: bool
    extra: dict[str, Any]


class CachedAnswer(BaseModel):
    """One answer in the journal: token ids, or for a choice the probability of each word."""

    model_config = ConfigDict(frozen=True)
    ids: list[TokenId] = []
    complete: bool = True
    shares: list[Annotated[float, Field(ge=0, le=1 + 1e-6)]] = []

    @model_validator(mode="after")
    def _something(self) -> CachedAnswer:
        if not {"ids", "shares"} & self.model_fields_set:
            raise ValueError("neither ids nor shares")
        return self

    @property
    def best(self) -> int:
        """Index of the likeliest word."""
        return max(range(len(self.shares)), key=self.shares.__getitem__)

    def text(self, tokenizer: PreTrainedTokenizerBase, asked: Asked) -> AnswerText:
        """The likeliest word, or the text without special tokens, up to the first stop text."""
        if len(self.shares) != len(asked.words):
            raise ArtifactError(
                f"a journal of answers has {len(self.shares)} shares for {len(asked.words)} words", AWAY
            )
        if self.shares:
            shown = [round(share, 6) for share in self.shares]
            return AnswerText(asked.words[self.best].strip(), True, {"shares": shown})
        text = tokenizer.decode(self.ids, skip_special_tokens=True)
        ends = [at for stop in asked.stop if (at := text.find(stop)) >= 0]
        length = {"tokens": len(self.ids)}
        return (
            AnswerText(text[: min(ends)], True, length) if ends else AnswerText(text, self.complete, length)
        )


class AnswerCache:
    """The answers to all questions of a benchmark, from a journal and, where it lacks one, from an engine.

    Each journal belongs to one identity (model, adapter, engine) and one way of sampling. Each of its lines
    belongs to one prompt and the number of the answer.
    """

    def __init__(
        self,
        asked: list[Asked],
        benchmark: BenchmarkSection,
        renderer: Renderer,
        identity: dict[str, Any],
        folder: Path,
        again: bool,
    ) -> None:
        self._asked, self._section = asked, benchmark
        sampling = Sampling(
            benchmark.max_new_tokens, tuple(renderer.stop_ids), benchmark.temperature, benchmark.top_p
        )
        self._sampling = sampling
        drawn = {"temperature": sampling.temperature, "top_p": sampling.top_p, "seed": benchmark.seed}
        how = {
            "longest": sampling.max_new_tokens,
            "stop": renderer.stop_ids,
            **(drawn if sampling.temperature else {}),
        }
        self._journal = Journal(folder / f"{key_of({**identity, 'sampling': how})}.jsonl", CachedAnswer)
        self._again = again
        self._keys = [key_of({"ids": a.ids, "stop": a.stop, "words": a.words}) for a in asked]
        self.recorded: dict[tuple[int, int], CachedAnswer] = {}

    def complete(self, engine: Callable[[], Engine], title: str, progress: Progress) -> None:
        """Ask for the answers that the journal lacks; the engine is started only if there are any."""
        with self._journal.writing(progress.say):
            wanted = [(i, n) for i in range(len(self._asked)) for n in range(self._section.samples)]
            # Equal prompts are asked once. Going backwards, the first of them is the one that stays.
            first = {(self._keys[i], n): (i, n) for i, n in reversed(wanted)}
            missing = [at for key, at in first.items() if self._again or key not in self._journal][::-1]
            if missing:
                ready = engine()
                progress.start(title, len(missing))
                self._ask(ready, missing, progress)
            self.recorded = {(i, n): CachedAnswer(**self._journal[self._keys[i], n]) for i, n in wanted}

    def _ask(self, engine: Engine, missing: list[tuple[int, int]], progress: Progress) -> None:
        choices = [(i, n) for i, n in missing if self._asked[i].words]
        texts = [(i, n) for i, n in missing if not self._asked[i].words]
        if choices:
            for at, choice in engine.choose([self._ballot(i) for i, _ in choices]):
                if isinstance(choice, Failure):
                    raise AnswerError(f"an item could not be answered: {choice.reason}: {choice.detail}")
                self._keep(choices[at], {"shares": choice.probabilities, "mass": choice.mass})
                progress.advance(1)
        if texts:
            questions = [self._question(i, n) for i, n in texts]
            for at, answer in engine.generate(questions, self._sampling):
                self._keep(texts[at], {"ids": answer.ids, "complete": answer.complete})
                progress.advance(1)

    def _keep(self, at: tuple[int, int], answer: dict[str, Any]) -> None:
        self._journal.keep((self._keys[at[0]], at[1]), answer)

    def _ballot(self, i: int) -> ChoiceRequest:
        return ChoiceRequest(self._asked[i].ids, self._asked[i].words)

    def _question(self, i: int, n: int) -> GenerateRequest:
        seed = seed_of({"question": self._keys[i], "seed": self._section.seed, "sample": n})
        return GenerateRequest(self._asked[i].ids, self._asked[i].stop, seed)
