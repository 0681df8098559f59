"""The work of each step, counted from a config and its rows, and what its pieces cost by `probe`."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from stages.benchmarks import benchmarks
from stages.config import Config, LaunchSection, PromptSection, RlSection, ScoreSection, SftSection
from stages.data.rows import read
from stages.errors import DataError, lacks_memory
from stages.language.prompts import IGNORED, Renderer, Row
from stages.lora.regions import strategies
from stages.models.tokenizer import load_tokenizer
from stages.pipeline import launch, questions
from stages.pipeline.cost import Cost, Memory
from stages.pipeline.lengths import Lengths, Span, drawn, sampled
from stages.pipeline.plan import Step
from stages.records import Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from stages.pipeline.probe import Piece, Probe

log = logging.getLogger(__name__)

BALLOTS = 256
"""Votes of which it is found out how many make a batch."""
STARTS = 40.0
"""Seconds until a vLLM server answers: 37 to 51 for 135 million parameters on two cores, more for more."""
SYSTEM1 = 0.5
"""Share of System 1 among the rows, before anybody has voted."""


@dataclass
class Work:
    """How much there is to do."""

    config: Config
    steps: list[Step]
    probe: Probe = field(init=False)
    starting: float = field(init=False)
    """Seconds until a command has its libraries, its tokenizer and its rows."""
    started: set[str] = field(default_factory=set)
    """Stages of which a step has been told that starts."""
    served: set[str] = field(default_factory=set)
    """What a step has been told to start a vLLM server for."""

    def __post_init__(self) -> None:
        config = self.config
        self.stages = {step.stage.name for step in self.steps}
        self.tokenizer: PreTrainedTokenizerBase = load_tokenizer(config.model)
        self.rows = {name: _items(config, name) for name in config.eval.benchmarks}
        self.rows["train"] = read(config.data) if config.data.path else []
        self.written: dict[str, tuple[Piece, Piece, int, list[int]]] = {}
        """By benchmark, because all targets write alike: see `Probe.writing`, the answers in a batch, and one
        of the prompts."""
        self.sample = sampled(self.rows["train"])
        self.rendered: dict[str, list[Row]] = {}

    def cost(self, step: Step) -> Cost:
        of: dict[str, Callable[[str], Cost]] = {
            "classify": self._votes,
            "score": lambda _: self._score,
            "partition": lambda _: Cost(0.0, None),
            "sft": self._sft,
            "rl": self._rl,
            "eval": self._answers,
        }
        try:
            found = of[step.stage.name](step.variant) if step.stage.name in of else Cost(None, None)
        except Exception as error:
            if not lacks_memory(error):
                raise
            return Cost(None, Memory(self.probe.room + 1))  # the smallest piece of it already
        if not found.seconds:
            return found
        probe, stage = self.probe, step.stage.name
        trains, starts = stage in ("sft", "rl"), stage not in self.started
        self.started.add(stage)
        gpus, _ = launch.shares(getattr(getattr(self.config, stage), "launch", LaunchSection()))
        seconds = found.seconds / gpus + probe.loading.seconds + (probe.trainer.seconds if trains else 0)
        seconds += (self.starting if starts else 0) + self._server(step)
        spared = 0 if trains else probe.trainer.mib
        memory = found.memory and found.memory.without(spared, probe.loading.mib)
        return Cost(seconds, memory)

    def _server(self, step: Step) -> float:
        """Seconds that this step waits for a vLLM server; one serves all steps of a command that ask it."""
        config, stage = self.config, step.stage.name
        voters = [v.engine for v in config.classify.voters] if config.classify.strategy == "vote" else []
        engines = {"classify": voters, "eval": [config.eval.engine]}.get(stage, [])
        asked = stage if stage == "classify" else step.variant.partition("@")[0]
        if "vllm" not in engines or asked in self.served:
            return 0.0
        self.served.add(asked)
        return STARTS

    def spans(self) -> list[Span]:
        """The lengths of what is asked, and of training rows where rows are trained on."""
        found = list(self._of_votes())
        data, rl, n = self.config.data, self.config.rl, len(self.rows["train"])
        if self.stages & {"score", "sft"}:
            rows = Lengths.of(len(row.input_ids) for row in self._rows("sft"))
            found.append(Span("row", n, rows, "data.max_length", data.max_length, data.too_long))
        if "rl" in self.stages:
            found.append(
                Span("prompt of rl", n, self._questions, "rl.max_prompt", rl.max_prompt, rl.too_long)
            )
            found.append(Span("response", n, self._responses, "rl.max_completion", rl.max_completion, "cut"))
        names = dict.fromkeys(
            step.variant.partition("@")[2] for step in self.steps if step.stage.name == "eval"
        )
        spans = (questions.of_benchmark(self.config, self.tokenizer, name, self.rows[name]) for name in names)
        return [*found, *filter(None, spans)]

    def _of_votes(self) -> Iterator[Span]:
        if self.config.classify.strategy == "vote":
            for name in (step.variant for step in self.steps if step.stage.name == "classify"):
                yield from questions.of_voters(self.config, self.tokenizer, name, self.rows[name])

    def _renderer(self, prompt: PromptSection | None) -> Renderer:
        return Renderer(self.tokenizer, prompt or self.config.prompt)

    def _rows(self, stage: str) -> list[Row]:
        """The sample as score, sft or rl has it."""
        if stage not in self.rendered:
            section: ScoreSection | SftSection | RlSection = getattr(self.config, stage)
            renderer = self._renderer(section.prompt)
            self.rendered[stage] = [renderer.row(example) for example in self.sample]
        return self.rendered[stage]

    def _mean(self, stage: str) -> float:
        """Tokens of a row, where too long ones are cut."""
        return Lengths.of(len(row.input_ids) for row in self._rows(stage)).within(self.config.data.max_length)

    @cached_property
    def _questions(self) -> Lengths:
        return Lengths.of(_asked(row) for row in self._rows("rl"))

    @cached_property
    def _responses(self) -> Lengths:
        return Lengths.of(len(row.labels) - _asked(row) for row in self._rows("rl"))

    def _votes(self, variant: str) -> Cost:
        section, examples = self.config.classify, self.rows[variant]
        if section.strategy != "vote" or not examples:
            return Cost(0.0, None)
        voters = section.voters
        if self.config.model.load_in_4bit or any(v.model or v.urls or v.thinking for v in voters):
            return Cost(None, None)  # the base itself votes in 16 bits
        seconds, mib = 0.0, 0.0
        for voter in voters:
            asked = questions.ballots(self.config, voter, drawn(examples, BALLOTS))
            piece, number = self.probe.choosing(asked)
            seconds += piece.seconds / number * len(examples) * voter.samples
            mib = max(mib, piece.mib)
        here = all(voter.engine == "transformers" for voter in voters)
        return Cost(seconds, self.probe.memory(mib) if here else None)

    @cached_property
    def _score(self) -> Cost:
        """Scoring again for RL costs the same."""
        score = self.config.score
        if strategies.has(self.config.partition.strategy, "unscored"):
            return Cost(0.0, None)
        number = 2 * min(score.examples, len(self.rows["train"]) / 2)
        rows = self._longest("score", 2 * score.batch_size, number)
        piece = self.probe.scoring(rows)
        seconds = number * self._mean("score") * piece.seconds / _tokens(rows)
        return Cost(seconds, self._divided(self.probe.memory(piece.mib), score.launch))

    def _divided(self, memory: Memory, launched: LaunchSection) -> Memory:
        """Of a process that holds a part of the base's layers, if `launched` divides them."""
        return memory.less(self.probe.layers_mib * (1 - launch.shares(launched)[1]))

    def _sft(self, _: str) -> Cost:
        from stages.lora.training import steps_of

        sft, config = self.config.sft, self.config
        if config.baseline is not None:
            return Cost(None, None)
        number = len(self.rows["train"])
        used = number if sft.data == "all" else number * SYSTEM1 * (1 + sft.system2_share)
        steps = steps_of(math.ceil(used / sft.batch_size), sft)
        rows = self._longest("sft", sft.micro_batch, min(used, number))  # which are tried before step 1
        piece = self.probe.tuning(rows, sft)
        seconds = steps * sft.batch_size * self._mean("sft") * piece.seconds / _tokens(rows)
        optimizer = self.probe.optimizer_mib()
        memory = self.probe.memory(piece.mib + optimizer, optimizer=optimizer)
        return Cost(seconds, self._divided(memory, sft.launch))

    def _rl(self, _: str) -> Cost:
        from stages.engines.generation import SLOTS
        from stages.lora.training import steps_of
        from stages.pipeline.probe import shares_prompts

        rl, probe = self.config.rl, self.probe
        if self.config.baseline is not None:
            return Cost(None, None)
        number = len(self.rows["train"])
        used = number if rl.data == "all" else number * (1 - SYSTEM1)
        steps = steps_of(int(used // (rl.prompts_per_step - rl.replayed)), rl, rl.iterations)
        if not steps:
            fill = f"{rl.prompts_per_step - rl.replayed} of a step"
            log.warning("rl: about %d rows do not fill the %s: lower rl.prompts_per_step", used, fill)
            return Cost(None, None)
        samples = rl.prompts_per_step * rl.group
        prompts = sorted(
            (row.input_ids[: _asked(row)][-rl.max_prompt :] for row in self._rows("rl")), key=len
        )
        groups = [ids for ids in reversed(prompts) for _ in range(rl.group)]
        batch = groups[: rl.micro_batch]
        piece = probe.steering(batch, rl)
        asked, answered = self._questions.within(rl.max_prompt), self._responses.within(rl.max_completion)
        times = rl.group if shares_prompts(rl) else 1
        learned = samples * (asked / times + answered)
        measured = sum(map(len, batch)) / times + len(batch) * rl.max_completion
        vllm = rl.rollouts.engine != "transformers"
        # The reference of the KL term, and what the completions had when they were sampled: forward alone.
        more = bool(rl.kl_beta) + (rl.iterations > 1 or (vllm and rl.rollouts.correction != "none"))
        seconds, optimizer = learned / measured * piece.seconds * (1 + more / 3), probe.optimizer_mib()
        trained = self._divided(probe.memory(piece.mib + optimizer, optimizer), rl.launch)
        written = groups[: min(samples, SLOTS)]
        read, token = probe.writing(written, rl.max_completion)
        last = min(self._responses.p99, rl.max_completion)  # a step waits for its longest
        some = read.seconds * asked / len(groups[0]) + last * token.seconds
        seconds += samples / len(written) * some / rl.iterations
        if not vllm:
            copy = probe.copy_mib() if launch.shares(rl.launch)[1] == 1 else 0.0
            sampling = probe.memory(token.mib + copy, cache=token.cache, copy=copy)  # from whole layers
            peak = max(trained.more(copy), sampling, key=lambda memory: memory.whole)
        elif rl.rollouts.engine == "vllm_colocate":
            peak = trained.more(cache=rl.rollouts.gpu_memory * probe.room)
        else:
            peak = trained
        return Cost(steps * seconds, peak)

    def _answers(self, variant: str) -> Cost:
        target, _, name = variant.partition("@")
        section, examples = self.config.eval.benchmarks[name], self.rows[name]
        if not examples:
            return Cost(None, None)
        written = questions.written(section)
        if name not in self.written:
            some = drawn(examples, self.config.server.batch_size)
            prompts = questions.prompts(self.config, self.tokenizer, name, some)
            self.written[name] = (*self.probe.writing(prompts, written), len(some), prompts[0])
        read, token, batch, prompt = self.written[name]
        mean, last = written, written
        if target not in ("base", "init"):
            mean, last = (min(written, round(n)) for n in (self._responses.mean, self._responses.p99))
        each = read.seconds + (mean - 1) * token.seconds
        seconds = len(examples) * section.samples / batch * each + (last - mean) * token.seconds
        again, here = 0.0, self.config.eval.engine == "transformers"
        checked = 0 if section.temperature else min(self.config.eval.parity_items, len(examples))
        adapted = target != "base"
        if checked and (adapted or not here):
            seconds += self._checked(checked, prompt, mean, adapted)
            again = self.probe.second_mib()
        if adapted:
            seconds += self.probe.adapting  # after `_checked`, which puts one in
        memory = self.probe.memory(token.mib + again, cache=token.cache, copy=again)
        return Cost(seconds, memory if here else None)

    def _checked(self, items: int, prompt: list[int], answer: int, adapted: bool) -> float:
        """Seconds of reading so many answers in plain PEFT, which loads the model once more."""
        from stages.benchmarks.parity import LONGEST

        length = len(prompt) + min(answer, LONGEST)
        row = (prompt * length)[:length]
        each = self.probe.comparing(row).seconds * (1 + adapted)  # beside the base's
        return self.probe.loading.seconds + items * each + adapted * self.probe.adapting

    def _longest(self, stage: str, number: int, of: float) -> list[Row]:
        """The `number` longest, about, of so many rows that are drawn; where there are fewer, some twice."""
        limit, cut = self.config.data.max_length, self.config.data.too_long == "truncate"
        rows = [Row(r.id, r.input_ids[:limit], r.labels[:limit]) if cut else r for r in self._rows(stage)]
        fitting = [row for row in rows if len(row.input_ids) <= limit and set(row.labels) != {IGNORED}]
        if not fitting:
            raise DataError(f"no row fits into data.max_length {limit}")
        ordered = sorted(fitting, key=lambda row: -len(row.input_ids))
        apart = max(1, round(len(self.rows["train"]) / of))
        found = ordered[min(apart // 2, len(ordered) - 1) :: apart][:number]
        return (found * number)[:number]


def _items(config: Config, name: str) -> list[Example]:
    section = config.eval.benchmarks[name]
    module = benchmarks.pick(section.kind)
    return list(module.load(section)) if hasattr(module, "load") else []


def _asked(row: Row) -> int:
    """Tokens of the prompt."""
    return sum(label == IGNORED for label in row.labels)


def _tokens(rows: list[Row]) -> int:
    return sum(len(row.input_ids) for row in rows)
