"""The texts that models will read, as token ids, and their lengths beside their limits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from stages.config import (
    SLOW,
    BenchmarkSection,
    Config,
    RlSection,
    ScoreSection,
    TrainSection,
    Voter,
    prompt_under,
)
from stages.data.rows import read
from stages.engines import ChoiceRequest, vllm
from stages.engines.in_process import choice_ids
from stages.errors import DataError
from stages.evaluation.benchmarks import benchmarks
from stages.labelling.personas import question_of
from stages.models.base import headers_only
from stages.models.load_errors import load_config, max_positions
from stages.models.tokenizer import load_tokenizer
from stages.pipeline.stage import TRAIN
from stages.pipeline.steps import Step
from stages.plan.tokens import Lengths, Span, sampled
from stages.prompts.chat_template import check_thought_limit
from stages.prompts.renderer import IGNORED, Renderer, Row
from stages.records import Example, Labelled
from stages.store.artifacts import Store

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TRAINING_SAMPLE, PROMPT_SAMPLE = 5000, 128
"""Random rows that are tokenised; prompts with worked examples may have a thousand tokens each."""

Imitating = ScoreSection | TrainSection


class Texts:
    """The rows of `train` and of each benchmark, and samples of their texts, random ones first.

    Made once by a command, for its checks and its estimate.
    """

    def __init__(self, config: Config, store: Store | None = None) -> None:
        """store: where the labels of the training rows lie."""
        self.config, self.store = config, store or Store(config.root)
        self.labels: list[Labelled] = []
        """Those of the training rows, once they are known."""
        self.rows = _Rows(config)
        self._training_rows: dict[str, list[Row]] = {}
        self._ballots: dict[str, list[list[ChoiceRequest]]] = {}
        self._prompts: dict[tuple[str, int], list[list[int]]] = {}

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return load_tokenizer(self.config.model)

    @cached_property
    def base(self) -> PreTrainedModel:
        """The base model without its weights; raises the error that loading it would raise."""
        return headers_only(self.config.model)

    def renderer(self, section: Imitating, mode: str = SLOW) -> Renderer:
        """The renderer of the rows of score, sft or rl, whose section this is, in the mode of most tokens."""
        prompt = prompt_under(section.prompt or self.config.prompt, self.config.modes, mode)
        return Renderer(self.tokenizer, prompt)

    def check_lengths(self, section: Imitating, rows: list[Example], mode: str = SLOW) -> None:
        """Raise DataError about a row that is too long, or too few rows, for score or sft."""
        self.renderer(section, mode).rows(sampled(rows, TRAINING_SAMPLE), self.config.data)

    def check_prompts(self, step: Step) -> None:
        """Raise DataError if more prompts of voters or a benchmark than may fail are too long."""
        for span in step.stage.spans(self, step.variant):
            if span.fails:
                limit = f"{span.limit} tokens ({span.setting.removesuffix(':')})"
                served = span.setting.startswith("server.")
                raise DataError(
                    f"{span.name}: {span.longer} of {span.rows} are longer than {limit}",
                    "raise server.max_model_len" if served else "fewer shots, or another model",
                )

    def training_rows(self, stage: Imitating) -> list[Row]:
        """Training rows in the prompt of score, sft or rl."""
        renderer = self.renderer(stage)
        rows = [row for row in self.rows[TRAIN] if row.response or isinstance(stage, RlSection)]
        if (key := f"{len(rows)} {renderer.section.model_dump_json()}") not in self._training_rows:
            examples = sampled(rows, TRAINING_SAMPLE)
            self._training_rows[key] = [renderer.row(example) for example in examples]
        return self._training_rows[key]

    def trained_rows(self, stage: Imitating) -> list[Row]:
        """Rows as score or SFT computes them, longest first; too long ones are cut or left out."""
        data, rows = self.config.data, self.training_rows(stage)
        if data.too_long == "truncate":
            length = data.max_length
            rows = [Row(row.id, row.input_ids[:length], row.labels[:length]) for row in rows]
        rows = [row for row in rows if len(row.input_ids) <= data.max_length and set(row.labels) != {IGNORED}]
        if not rows:
            raise DataError(f"no row fits into data.max_length {data.max_length}")
        return sorted(rows, key=lambda row: -len(row.input_ids))

    @cached_property
    def imitable(self) -> int:
        """Number of training rows with a response; score and SFT leave the others out."""
        return sum(bool(row.response) for row in self.rows[TRAIN])

    @cached_property
    def rl_prompts(self) -> Lengths:
        return Lengths(prompt_length(row) for row in self.training_rows(self.config.rl))

    def imitated(self) -> Iterator[Span]:
        """The lengths of the rows that score and SFT read."""
        if rows := self.training_rows(self.config.sft):
            lengths, data = Lengths(len(row.input_ids) for row in rows), self.config.data
            yield Span("row", self.imitable, lengths, "data.max_length", data.max_length, data.too_long)

    def response_tokens(self, limit: int) -> float:
        """Mean length of a trained model's answers: as the responses or, if no row has one, the limit."""
        return self.responses.within(limit) if self.imitable else float(limit)

    @cached_property
    def responses(self) -> Lengths:
        return Lengths(len(row.labels) - prompt_length(row) for row in self.training_rows(self.config.sft))

    def ballots(self, name: str) -> list[list[ChoiceRequest]]:
        """Tokenised requests about these rows by voter; none for voters other than the base."""
        if name not in self._ballots:
            self._ballots[name] = [self._requests(voter, name) for voter in self.config.classify.voters]
        return self._ballots[name]

    def _requests(self, voter: Voter, name: str) -> list[ChoiceRequest]:
        if voter.model or voter.base_url:  # it has its own tokenizer
            return []
        question = question_of(voter, self.config.model.title, self.config.classify.show_answer)
        ballots = [question(example) for example in sampled(self.rows[name], PROMPT_SAMPLE)]
        return [replace(ballot, text=choice_ids(self.tokenizer, ballot)) for ballot in ballots]

    def prompts(self, name: str, target: str = "") -> list[list[int]]:
        """Token ids of prompts of a benchmark, with the worked examples that a target gets."""
        section = self.config.eval.as_asked(self.config.eval.benchmarks[name], target)
        if (name, section.shots) not in self._prompts:
            prompt = section.prompt or self.config.prompt
            renderer = Renderer(self.tokenizer, prompt_under(prompt, self.config.modes, SLOW))
            if section.max_thinking_tokens:
                setting = f"eval.benchmarks.{name}.max_thinking_tokens"
                check_thought_limit(self.tokenizer, renderer.marks, setting)
            sample = sampled(self.rows[name], PROMPT_SAMPLE)
            asked = benchmarks.pick(section.kind).ask(sample, section, renderer) if sample else []
            self._prompts[name, section.shots] = [prompt.ids for prompt in asked]
        return self._prompts[name, section.shots]

    def limit(
        self, engine: str, reply: int, arguments: dict[str, Any] | None = None
    ) -> tuple[str, int | None]:
        """The limit of a prompt that a reply of so many tokens follows: its name, and tokens if there is one.

        arguments: those of a voter's own vLLM server.
        """
        model, server = self.config.model, self.config.server
        if engine == "transformers":
            limit, name = max_positions(load_config(model)), "what the model reads"
        else:
            limit = vllm.context_length(model, server.with_vllm(arguments or {}))
            name = "server.max_model_len"
        if limit is None:
            return name, None
        return (f"{name}, less {reply}:" if reply > 1 else name), limit - reply

    @property
    def typical_prompt(self) -> list[int]:
        """Any training prompt, or without training rows any prompt of a benchmark."""
        if not self.rows[TRAIN]:
            return next(filter(None, map(self.prompts, self.config.eval.benchmarks)))[0]
        row = self.training_rows(self.config.rl)[0]
        return row.input_ids[: prompt_length(row)]


class _Rows(dict[str, list[Example]]):
    """Rows of `train` and of the benchmarks by name, each read when it is asked for first."""

    def __init__(self, config: Config) -> None:
        self._config = config

    def __missing__(self, name: str) -> list[Example]:
        data = self._config.data
        if name == TRAIN:
            self[name] = read(data) if data.path else []
        else:
            section = self._config.eval.benchmarks[name]
            self[name] = list(benchmarks.pick(section.kind).load(section))
        return self[name]


def prompt_length(row: Row) -> int:
    return sum(label == IGNORED for label in row.labels)


def generation_limit(section: BenchmarkSection) -> int:
    """The most tokens that a model may generate for one prompt of a benchmark."""
    if section.mode == "likelihood":
        return 1
    return section.max_new_tokens + (section.max_thinking_tokens or 0)
