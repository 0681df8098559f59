"""The answers of one evaluation: cached in a journal on disk, and graded, each by its text."""

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from stages.config import BenchmarkSection
from stages.engines import ChoiceRequest, Engine, Failure, GenerateRequest, Sampling
from stages.errors import AnswerError, ArtifactError
from stages.evaluation.benchmarks import benchmarks
from stages.evaluation.grading import Context, Grade
from stages.progress import Progress
from stages.prompts import thoughts
from stages.prompts.chat_template import check_thought_limit
from stages.prompts.renderer import RenderedPrompt, Renderer
from stages.records import Labelled, Sample
from stages.runtime import resources
from stages.store.artifacts import MOVE_AWAY_HINT
from stages.store.digests import key_of, seed_of
from stages.store.journal import Journal

Slot = tuple[int, int]
"""Number of a prompt, and of one of its samples."""
TokenId = Annotated[int, Field(ge=0, lt=2**31)]


class CachedAnswer(BaseModel):
    """One answer in the journal: token ids, or for a choice the probability of each word (`shares`)."""

    model_config = ConfigDict(frozen=True)
    ids: list[TokenId] = []
    complete: bool = True
    shares: list[Annotated[float, Field(ge=0, le=1 + 1e-6)]] = []

    @property
    def best(self) -> int:
        """Index of the likeliest word."""
        return max(range(len(self.shares)), key=self.shares.__getitem__)

    def text(self, renderer: Renderer, prompt: RenderedPrompt) -> tuple[str, bool, dict[str, Any]]:
        """The likeliest word, or the text without special tokens, up to the first stop text.

        Also whether it is complete, and fields for its sample. Raises ArtifactError if the number of shares
        is not that of the prompt's words.
        """
        if len(self.shares) != len(prompt.words):
            raise ArtifactError(
                f"a journal of answers has {len(self.shares)} shares for {len(prompt.words)} words",
                MOVE_AWAY_HINT,
            )
        if self.shares:
            shares = [round(share, 6) for share in self.shares]
            return prompt.words[self.best].strip(), True, {"shares": shares}
        text = renderer.read(self.ids, prompt.text)
        stops = [at for stop in prompt.stop if (at := text.find(stop)) >= 0]
        extra = {"tokens": len(self.ids)}
        if (answer := thoughts.after_thought(text)) != text:
            answer_tokens = len(renderer.tokenizer(answer, add_special_tokens=False)["input_ids"])
            extra["thought_tokens"] = max(0, len(self.ids) - answer_tokens)
        return text[: min(stops, default=None)], bool(stops) or self.complete, extra


class AnswerCache:
    """The answers to all items of a benchmark, from a journal and, where it lacks one, from an engine.

    The file of a journal is named by a key of the identity (model, adapter, engine) and the sampling. The key
    of a line is the prompt and the number of the sample.
    """

    def __init__(
        self,
        rows: list[Labelled],
        benchmark: BenchmarkSection,
        renderer: Renderer,
        identity: dict[str, Any],
        folder: Path,
        regenerate: bool,
    ) -> None:
        """identity: what determines the answers, apart from prompts and sampling.

        regenerate: replace the answers that are in the journal.
        """
        self.rows, self._section, self.renderer, self._regenerate = rows, benchmark, renderer, regenerate
        self._kind = benchmarks.pick(benchmark.kind)
        self.prompts: list[RenderedPrompt] = self._kind.ask(
            [row.example for row in rows], benchmark, renderer
        )
        self._slots = [(i, n) for i in range(len(rows)) for n in range(benchmark.samples)]
        self._sampling = Sampling(benchmark.max_new_tokens, tuple(renderer.stop_ids), benchmark.temperature)
        if benchmark.max_thinking_tokens:
            check_thought_limit(renderer.tokenizer, renderer.marks, "eval.benchmarks: max_thinking_tokens")
        limits = {"sampling": asdict(self._sampling), "thought": benchmark.max_thinking_tokens}
        key = key_of({**identity, **limits})
        self._journal = Journal(folder / f"{key}.jsonl", CachedAnswer)
        self._keys = [key_of({"ids": p.ids, "stop": p.stop, "words": p.words}) for p in self.prompts]
        self.answers: dict[Slot, CachedAnswer] = {}
        """Filled by `complete`."""

    def complete(self, engine: Callable[[], Engine], title: str, progress: Progress) -> None:
        """Generate the answers that the journal lacks; the engine is started only if there are any."""
        with self._journal.writing(progress.say):
            first_slots: dict[tuple[str, int], Slot] = {}
            for i, n in self._slots:  # equal prompts have one key and are answered once
                first_slots.setdefault((self._keys[i], n), (i, n))
            missing = [
                slot for key, slot in first_slots.items() if self._regenerate or key not in self._journal
            ]
            if missing:
                started = engine()
                progress.start(title, len(missing))
                self._generate(started, missing, progress)
            self.answers = {(i, n): CachedAnswer(**self._journal[self._keys[i], n]) for i, n in self._slots}

    def graded(self, context: Context, progress: Progress) -> list[Sample]:
        """Grade every answer, in the order of rows and samples. Programs run side by side on all cores."""
        if context.sandbox:
            progress.start("running programs", len(self._slots))

        def grade(slot: Slot) -> Sample:
            row, prompt = self.rows[slot[0]], self.prompts[slot[0]]
            example = row.example
            output, complete, extra = self.answers[slot].text(self.renderer, prompt)
            verdict: Grade = self._kind.grade(example, output, context)
            if context.sandbox:
                progress.advance(1)
            # A row's own `tokens` would count as the length of its answer.
            fields = {name: value for name, value in example.extra.items() if name != "tokens"}
            return Sample(
                id=example.id,
                sample=slot[1],
                system=row.system,
                prompt=prompt.text,
                output=output,
                gold=example.gold,
                strict=verdict.strict,
                flexible=verdict.flexible,
                correct=verdict.correct,
                correct_flexible=verdict.correct_flexible,
                outcome=_outcome(verdict, complete),
                extra={**fields, **verdict.extra, **extra},
            )

        with ThreadPoolExecutor(resources.usable_cores() if context.sandbox else 1) as pool:
            return list(pool.map(grade, self._slots))

    def _generate(self, engine: Engine, missing: list[Slot], progress: Progress) -> None:
        """Have the engine answer these prompts and samples, and journal each answer as it arrives."""
        choices = [(i, n) for i, n in missing if self.prompts[i].words]
        texts = [(i, n) for i, n in missing if not self.prompts[i].words]

        def record(slot: Slot, answer: dict[str, Any]) -> None:
            self._journal.add((self._keys[slot[0]], slot[1]), answer)
            progress.advance(1)

        if choices:
            word_choices = [ChoiceRequest(self.prompts[i].ids, self.prompts[i].words) for i, _ in choices]
            for k, choice in engine.choose_words(word_choices):
                if isinstance(choice, Failure):
                    raise AnswerError(
                        f"an item could not be answered: {choice.reason}: {choice.detail}",
                        "if it is too long: fewer shots of the benchmark, or another model",
                    )
                record(choices[k], {"shares": choice.probabilities})
        for slot, ids, complete in self._complete_texts(engine, texts):
            record(slot, {"ids": ids, "complete": complete})

    def _complete_texts(self, engine: Engine, slots: list[Slot]) -> Iterator[tuple[Slot, list[int], bool]]:
        """Yield the tokens of each answer, and whether they came to an end.

        With a limit of thinking, an answer is generated up to that first. One without an end goes on, after
        the end of its thought if that is still open.
        """
        thinking, begun = self._section.max_thinking_tokens, dict[Slot, list[int]]()
        if thinking and slots:
            sampling = replace(self._sampling, max_new_tokens=thinking)
            for k, completion in engine.generate(self._requests(slots, {}), sampling):
                if completion.complete:
                    yield slots[k], completion.ids, True
                else:
                    text = self.prompts[slots[k][0]].text
                    begun[slots[k]] = completion.ids + self.renderer.closing_ids(text, completion.ids)
            slots = list(begun)
        if slots:
            for k, completion in engine.generate(self._requests(slots, begun), self._sampling):
                yield slots[k], begun.get(slots[k], []) + completion.ids, completion.complete

    def closing_span(self, row: int) -> range:
        """Places of the tokens that closed the thought of the first answer to a row."""
        limit, answer = self._section.max_thinking_tokens, self.answers[row, 0]
        if not limit or answer.shares:
            return range(0)
        return self.renderer.closing_span(self.prompts[row].text, answer.ids, limit)

    def _requests(self, slots: list[Slot], begun: Mapping[Slot, list[int]]) -> list[GenerateRequest]:
        """Requests for answers, or for what follows those that have begun."""
        requests = []
        for i, n in slots:
            prompt, beginning = self.prompts[i], begun.get((i, n), [])
            after = {"after": len(beginning)} if beginning else {}
            seed = seed_of({"question": self._keys[i], "sample": n, **after})
            requests.append(GenerateRequest(prompt.ids + beginning, prompt.stop, seed))
        return requests


def _outcome(grade: Grade, complete: bool) -> str:
    """One of `records.OUTCOMES`; complete: the answer did not end at the length limit."""
    if grade.refused:
        return "refused"
    if grade.correct:
        return "correct"
    if not complete:
        return "truncated"
    return "unparsed" if grade.strict is None else "wrong"
