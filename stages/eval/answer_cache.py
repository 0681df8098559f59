"""Cache of the answers of one evaluation, in a journal on disk, and each answer as text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from stages.config import BenchmarkSection
from stages.engines import ChoiceRequest, Engine, Failure, GenerateRequest, Sampling
from stages.engines.openai.replies import TokenId
from stages.errors import AnswerError, ArtifactError
from stages.prompts.renderer import RenderedPrompt
from stages.store.artifacts import MOVE_AWAY_HINT
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
    """One answer in the journal: token ids, or for a choice the probability of each word (`shares`)."""

    model_config = ConfigDict(frozen=True)
    ids: list[TokenId] = []
    complete: bool = True
    shares: list[Annotated[float, Field(ge=0, le=1 + 1e-6)]] = []

    @model_validator(mode="after")
    def _has_ids_or_shares(self) -> CachedAnswer:
        if not {"ids", "shares"} & self.model_fields_set:
            raise ValueError("neither ids nor shares")
        return self

    @property
    def best(self) -> int:
        """Index of the likeliest word."""
        return max(range(len(self.shares)), key=self.shares.__getitem__)

    def text(self, tokenizer: PreTrainedTokenizerBase, prompt: RenderedPrompt) -> AnswerText:
        """The likeliest word, or the text without special tokens, up to the first stop text.

        Raises ArtifactError if the number of shares is not that of the prompt's words.
        """
        if len(self.shares) != len(prompt.words):
            raise ArtifactError(
                f"a journal of answers has {len(self.shares)} shares for {len(prompt.words)} words",
                MOVE_AWAY_HINT,
            )
        if self.shares:
            shares = [round(share, 6) for share in self.shares]
            return AnswerText(prompt.words[self.best].strip(), True, {"shares": shares})
        text = tokenizer.decode(self.ids, skip_special_tokens=True)
        length = {"tokens": len(self.ids)}
        stops = [at for stop in prompt.stop if (at := text.find(stop)) >= 0]
        if stops:
            return AnswerText(text[: min(stops)], True, length)
        return AnswerText(text, self.complete, length)


class AnswerCache:
    """The answers to all prompts of a benchmark, from a journal and, where it lacks one, from an engine.

    The file of a journal is named by a key of the identity (model, adapter, engine) and the sampling. The key
    of a line is the prompt and the number of the sample.
    """

    def __init__(
        self,
        prompts: list[RenderedPrompt],
        benchmark: BenchmarkSection,
        renderer: Renderer,
        identity: dict[str, Any],
        folder: Path,
        regenerate: bool,
    ) -> None:
        """identity: what determines the answers, apart from prompts and sampling.

        regenerate: replace the answers that are in the journal.
        """
        self._prompts, self._section = prompts, benchmark
        sampling = Sampling(
            benchmark.max_new_tokens, tuple(renderer.stop_ids), benchmark.temperature, benchmark.top_p
        )
        self._sampling = sampling
        # Greedy answers depend on neither top_p nor the seed.
        randomness = {"temperature": sampling.temperature, "top_p": sampling.top_p, "seed": benchmark.seed}
        sampling_key = {
            "longest": sampling.max_new_tokens,
            "stop": renderer.stop_ids,
            **(randomness if sampling.temperature else {}),
        }
        key = key_of({**identity, "sampling": sampling_key})
        self._journal = Journal(folder / f"{key}.jsonl", CachedAnswer)
        self._regenerate = regenerate
        self._keys = [key_of({"ids": p.ids, "stop": p.stop, "words": p.words}) for p in prompts]
        self.answers: dict[tuple[int, int], CachedAnswer] = {}
        """The answer to each prompt and sample, by their numbers; filled by `complete`."""

    def complete(self, engine: Callable[[], Engine], title: str, progress: Progress) -> None:
        """Generate the answers that the journal lacks; the engine is started only if there are any."""
        with self._journal.writing(progress.say):
            slots = [(i, n) for i in range(len(self._prompts)) for n in range(self._section.samples)]
            first_slots: dict[tuple[str, int], tuple[int, int]] = {}
            for i, n in slots:  # equal prompts have one key and are answered once
                first_slots.setdefault((self._keys[i], n), (i, n))
            keys = [key for key in first_slots if self._regenerate or key not in self._journal]
            if missing := [first_slots[key] for key in keys]:
                started = engine()
                progress.start(title, len(missing))
                self._generate(started, missing, progress)
            self.answers = {(i, n): CachedAnswer(**self._journal[self._keys[i], n]) for i, n in slots}

    def _generate(self, engine: Engine, missing: list[tuple[int, int]], progress: Progress) -> None:
        """Have the engine answer these prompts and samples, and journal each answer as it arrives."""
        choices = [(i, n) for i, n in missing if self._prompts[i].words]
        texts = [(i, n) for i, n in missing if not self._prompts[i].words]

        def record(slot: tuple[int, int], answer: dict[str, Any]) -> None:
            i, n = slot
            self._journal.add((self._keys[i], n), answer)
            progress.advance(1)

        if choices:
            word_choices = [ChoiceRequest(self._prompts[i].ids, self._prompts[i].words) for i, _ in choices]
            for k, choice in engine.choose_words(word_choices):
                if isinstance(choice, Failure):
                    raise AnswerError(
                        f"an item could not be answered: {choice.reason}: {choice.detail}",
                        "if it is too long: fewer shots of the benchmark, or another model",
                    )
                record(choices[k], {"shares": choice.probabilities, "mass": choice.mass})
        if texts:
            requests = [self._generate_request(i, n) for i, n in texts]
            for k, completion in engine.generate(requests, self._sampling):
                record(texts[k], {"ids": completion.ids, "complete": completion.complete})

    def _generate_request(self, i: int, n: int) -> GenerateRequest:
        seed = seed_of({"question": self._keys[i], "seed": self._section.seed, "sample": n})
        return GenerateRequest(self._prompts[i].ids, self._prompts[i].stop, seed)
