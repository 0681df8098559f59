"""What a step will cost on this machine: its work is counted, and told from one measured batch of each kind.

Assumed is what nobody can know before: half of the rows are System 1, a trained model answers as long as the
references are and an untrained one as long as it may, vLLM writes no faster than this process would, and
several GPUs each do their share in its time.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from statistics import fmean

from stages.config import UNTRAINED, Config, LaunchSection
from stages.data.rows import read
from stages.engines.continuous_batching import FREE, SLOTS
from stages.engines.in_process import batches, choice_ids
from stages.errors import DataError, lacks_memory
from stages.labelling.personas import held_out
from stages.lora.importance.strategies import strategies
from stages.lora.training.loop import steps_of
from stages.models.tokenizer import load_tokenizer
from stages.packing.batch import common_prefix_length
from stages.pipeline import launch
from stages.pipeline.steps import Step
from stages.plan import prompt_lengths
from stages.plan.cost import Cost, MemoryEstimate
from stages.plan.lengths import Lengths, drawn, sampled
from stages.plan.profiler import Measurement, Profiler
from stages.prompts.renderer import IGNORED, Renderer, Row
from stages.runtime import fork_server
from stages.runtime.resources import MIB

log = logging.getLogger(__name__)

START_S, FORK_S = 10.0, 2.0
"""Seconds until the process of a stage has its libraries and its rows, started anew or forked from one that
has the libraries. It starts once for all its steps."""
SERVER_S = 40.0
"""Seconds until a vLLM server answers: 37 to 51 for 135 million parameters on two cores, more for more."""
SYSTEM1 = 0.5
"""Share of System 1 among the rows, before anybody has voted."""
TEXTS = 128
"""Texts of a kind from whose tokens those of all are told."""
ADAM_BYTES = 16
"""For each element of the adapter: its gradient, Adam's two moments, and its place among the packed ones."""


@dataclass(frozen=True)
class Work:
    """The work of a step, before it is known what several threads gain."""

    thread_s: float = 0.0
    """Computation by one thread, or by one GPU."""
    memory: MemoryEstimate | None = None
    loads: int = 1
    """How often the model is loaded."""


NOTHING = Work(loads=0)


@dataclass
class CostModel:
    """How much there is to do, in tokens, and what that takes by the profiler's measurements."""

    config: Config
    steps: list[Step]
    profiler: Profiler = field(init=False)

    def __post_init__(self) -> None:
        config = self.config
        self.stages = {step.stage.name for step in self.steps}
        self.tokenizer = load_tokenizer(config.model)
        self.rows = {name: prompt_lengths.items(config, name) for name in config.eval.benchmarks}
        self.rows["train"] = read(config.data) if config.data.path else []
        self.sample = sampled(self.rows["train"])
        self._rendered: dict[str, list[Row]] = {}
        self._started: set[str] = set()
        self._served: set[str] = set()

    def work(self, step: Step) -> Work | None:
        """None if nothing is known of it."""
        of: dict[str, Callable[[str], Work | None]] = {
            "classify": self._votes,
            "score": lambda _: self._score,
            "partition": lambda _: NOTHING,
            "sft": lambda _: self._sft(),
            "rl": lambda _: self._rl(),
            "eval": self._answers,
        }
        try:
            return of[step.stage.name](step.variant) if step.stage.name in of else None
        except Exception as error:
            if not lacks_memory(error):
                raise
            return Work(
                memory=MemoryEstimate(activations=self.profiler.room + 1)
            )  # one row of it does not fit

    def cost(self, step: Step, work: Work | None, speedup: float) -> Cost:
        """speedup: by the threads of a stage, see `Profiler.speedup`."""
        stage = step.stage.name
        if work is None:
            return Cost()
        if not work.thread_s:
            return Cost(None if work.memory else 0.0, work.memory)
        gpus, _ = launch.gpu_split(getattr(getattr(self.config, stage), "launch", LaunchSection()))
        seconds = work.thread_s / speedup / gpus + work.loads * self.profiler.loading_s + self._server_s(step)
        start = 0.0 if stage in self._started else FORK_S if fork_server.can_fork() else START_S
        self._started.add(stage)
        return Cost(start + seconds, work.memory)

    def _server_s(self, step: Step) -> float:
        """Seconds that this step waits for a vLLM server; one serves all steps of a command that ask it."""
        config, stage = self.config, step.stage.name
        votes = stage == "classify" and config.labelled_by(step.variant) == "vote"
        voters = [voter.engine for voter in config.classify.voters] if votes else []
        engines = {"classify": voters, "eval": [config.eval.engine]}.get(stage, [])
        model = stage if stage == "classify" else step.variant.partition("@")[0]
        if "vllm" not in engines or model in self._served:
            return 0.0
        self._served.add(model)
        return SERVER_S

    def training_rows(self, stage: str) -> list[Row]:
        """The sample as score, sft or rl has it."""
        if stage not in self._rendered:
            renderer = Renderer(self.tokenizer, getattr(self.config, stage).prompt or self.config.prompt)
            self._rendered[stage] = [renderer.row(example) for example in self.sample]
        return self._rendered[stage]

    @cached_property
    def rl_prompts(self) -> Lengths:
        return Lengths.of(prompt_length(row) for row in self.training_rows("rl"))

    @cached_property
    def responses(self) -> Lengths:
        return Lengths.of(len(row.labels) - prompt_length(row) for row in self.training_rows("rl"))

    def _longest_first(self, stage: str) -> list[Row]:
        """The sample as it is computed, with what is too long cut or left out."""
        limit, cut = self.config.data.max_length, self.config.data.too_long == "truncate"
        rows = self.training_rows(stage)
        rows = [Row(r.id, r.input_ids[:limit], r.labels[:limit]) if cut else r for r in rows]
        fitting = [row for row in rows if len(row.input_ids) <= limit and set(row.labels) != {IGNORED}]
        if not fitting:
            raise DataError(f"no row fits into data.max_length {limit}")
        return sorted(fitting, key=lambda row: -len(row.input_ids))

    def _votes(self, variant: str) -> Work | None:
        voters, examples = self.config.classify.voters, self.rows[variant]
        if self.config.labelled_by(variant) != "vote" or not examples:
            return NOTHING
        if self.config.model.load_in_4bit or any(v.model or v.urls or v.thinking for v in voters):
            return None  # the base itself votes in 16 bits
        some = drawn(examples, TEXTS)
        asked = [prompt_lengths.ballots(self.config, voter, some) for voter in voters]
        texts = [sorted(choice_ids(self.tokenizer, ballot) for ballot in ballots) for ballots in asked]
        sizes = [max(batches(ids)) for ids in texts]
        # Those with the longest prompts are measured for all voters, and for the rows of benchmarks, too.
        most = max(range(len(voters)), key=lambda i: len(texts[i][-1]))
        measured = self.profiler.votes(asked[most])
        tokens = [per_text(ids, size) for ids, size in zip(texts, sizes, strict=True)]
        calibrating = len(held_out(self.config.classify.held_out)) if variant == "train" else 0
        number = len(examples) + calibrating  # whose votes are in the journal when other rows are labelled
        total = sum(number * voter.samples * each for voter, each in zip(voters, tokens, strict=True))
        largest = max(size * each for size, each in zip(sizes, tokens, strict=True))
        here = all(voter.engine == "transformers" for voter in voters)
        memory = self._memory(measured.mib_of(largest)) if here else None
        return Work(total * measured.token_s, memory)

    @cached_property
    def _score(self) -> Work:
        """Scoring again for RL costs the same."""
        score, number = self.config.score, len(self.rows["train"])
        if strategies.has(self.config.partition.strategy, "unscored"):
            return NOTHING
        rows = self._longest_first("score")
        measured = self.profiler.scoring(rows[: score.batch_size])
        memory = self._memory(measured.mib_of(tokens_of(rows[: score.batch_size])), adapted=True)
        tokens = 2 * min(score.examples, number / 2) * tokens_of(rows) / len(rows)
        return Work(tokens * measured.token_s, self._divided(memory, score.launch))

    def _sft(self) -> Work | None:
        sft, number = self.config.sft, len(self.rows["train"])
        if self.config.baseline is not None:
            return None
        used = number if sft.data == "all" else number * SYSTEM1 * (1 + sft.system2_share)
        steps = steps_of(math.ceil(used / sft.batch_size), sft)
        rows = self._longest_first("sft")
        measured = self.profiler.training(
            rows[: sft.per_device_train_batch_size], sft, sft.padding_free == "auto"
        )
        memory = self._memory(
            measured.mib_of(tokens_of(rows[: sft.per_device_train_batch_size])), adapted=True, trains=True
        )
        size = 1 if sft.lora_dropout or sft.padding_free == "off" else sft.per_device_train_batch_size
        tokens = steps * sft.batch_size * per_text([row.input_ids for row in rows], size)
        return Work(tokens * measured.token_s, self._divided(memory, sft.launch))

    def _rl(self) -> Work | None:
        rl, number = self.config.rl, len(self.rows["train"])
        if self.config.baseline is not None:
            return None
        used = number if rl.data == "all" else number * (1 - SYSTEM1)
        steps = steps_of(int(used // (rl.prompts_per_step - rl.replayed)), rl, rl.num_iterations)
        if not steps:
            fill = f"{rl.prompts_per_step - rl.replayed} of a step"
            log.warning("rl: about %d rows do not fill the %s: lower rl.prompts_per_step", used, fill)
            return None
        rows = self._longest_first("rl")
        fits, shares = (
            self.profiler.fits(rows[0].input_ids),
            rl.prefix_sharing == "auto" and not rl.lora_dropout,
        )
        measured = self.profiler.training(
            rows[: rl.per_device_train_batch_size], rl, rl.prefix_sharing == "auto"
        )
        prompt, answer = (
            self.rl_prompts.within(rl.max_prompt_length),
            self.responses.within(rl.max_completion_length),
        )
        completions, apart = (
            rl.prompts_per_step * rl.num_generations,
            1 / rl.num_generations if fits and shares else 1,
        )
        # The reference of the KL term, and what the completions had when they were sampled: forward alone,
        # which is a third.
        corrected = rl.rollouts.engine != "transformers" and rl.rollouts.correction != "none"
        passes = 1 + (bool(rl.beta) + (rl.num_iterations > 1 or corrected)) / 3
        learning = completions * (prompt * apart + answer) * passes * measured.token_s
        sampling = self._writing_s(completions, prompt / rl.num_generations if fits else prompt, answer)
        longest = min(self.rl_prompts.longest, rl.max_prompt_length)
        activations = measured.mib_of(
            rl.per_device_train_batch_size * (longest * apart + rl.max_completion_length)
        )
        trained = self._divided(self._memory(activations, adapted=True, trains=True), rl.launch)
        memory = self._beside_rollouts(trained, min(completions, SLOTS), longest + rl.max_completion_length)
        return Work(steps * (learning + sampling / rl.num_iterations), memory)

    def _beside_rollouts(self, trained: MemoryEstimate, slots: int, length: int) -> MemoryEstimate:
        """Memory of RL, given that of its training passes: the more of these and of sampling."""
        rl, profiler = self.config.rl, self.profiler
        if rl.rollouts.engine != "transformers":
            colocated = rl.rollouts.engine == "vllm_colocate"
            return replace(
                trained, cache=rl.rollouts.gpu_memory_utilization * profiler.room if colocated else 0.0
            )
        divided = launch.gpu_split(rl.launch)[1] < 1
        copy = 0.0 if divided or self.config.model.load_in_4bit else profiler.copy_mib
        sampling = self._memory(self.generation[1].mib_of(slots), adapted=True, trains=True, copy=copy)
        sampling = replace(sampling, cache=slots * length * profiler.token_bytes / MIB)
        trained = replace(trained, weights=trained.weights + copy)
        return max(trained, sampling, key=lambda memory: memory.total)

    @cached_property
    def generation(self) -> tuple[Measurement, Measurement]:
        """Reading and writing, see `Profiler.generation`, behind a prompt of usual length."""
        if self.rows["train"]:
            rows = sorted(self.training_rows("rl"), key=prompt_length)
            prompt = rows[len(rows) // 2].input_ids[: prompt_length(rows[len(rows) // 2])]
        else:
            name = next(name for name, examples in self.rows.items() if examples)
            [prompt] = prompt_lengths.prompts(self.config, self.tokenizer, name, self.rows[name][:1])
        return self.profiler.generation(prompt)

    def _writing_s(self, answers: float, prompt: float, mean: float) -> float:
        """Seconds of one thread to write answers: for each so many tokens are read and written.

        Places of answers that have ended are closed up when a share of FREE is free.
        """
        reading, writing = self.generation
        return answers * (prompt * reading.token_s + mean * (1 + FREE) * writing.token_s)

    def _answers(self, variant: str) -> Work | None:
        target, _, name = variant.partition("@")
        section, examples = self.config.eval.benchmarks[name], self.rows[name]
        if target in UNTRAINED:
            examples = examples[: self.config.eval.untrained_items]
        if not examples:
            return None
        limit, slots = prompt_lengths.written(section), min(self.config.server.batch_size, len(examples))
        prompts = prompt_lengths.prompts(self.config, self.tokenizer, name, drawn(examples, TEXTS))
        trained = target not in UNTRAINED and self.rows["train"]
        mean = min(float(limit), self.responses.mean) if trained else float(limit)
        seconds = self._writing_s(len(examples) * section.samples, per_text(prompts, slots), mean)
        adapted, here = target != "base", self.config.eval.engine == "transformers"
        checked = min(self.config.eval.parity_items, len(examples)) * (adapted or not here)
        if checked := checked * (not section.temperature):  # by plain PEFT, and beside the base's answers
            read = fmean(map(len, prompts)) + mean
            seconds += checked * (1 + adapted) * read * self.generation[0].token_s
        copy = self.profiler.copy_mib if checked else 0.0
        memory = self._memory(self.generation[1].mib_of(slots), adapted=adapted, copy=copy)
        cache = slots * (max(map(len, prompts)) + limit) * self.profiler.token_bytes / MIB
        return Work(seconds, replace(memory, cache=cache) if here else None, loads=1 + bool(checked))

    def _memory(
        self, activations: float, adapted: bool = False, trains: bool = False, copy: float = 0.0
    ) -> MemoryEstimate:
        """copy: weights of a second model. trains: with an optimizer."""
        profiler = self.profiler
        elements = profiler.adapter_elements if adapted else 0
        return MemoryEstimate(
            libraries=profiler.libraries_mib,
            weights=profiler.weights_mib + elements * 4 / MIB + copy,
            optimizer=elements * ADAM_BYTES / MIB * trains,
            activations=activations,
        )

    def _divided(self, memory: MemoryEstimate, launched: LaunchSection) -> MemoryEstimate:
        """Memory of a process that holds a part of the base's layers, if `launched` divides them."""
        spared = self.profiler.layers_mib * (1 - launch.gpu_split(launched)[1])
        return replace(memory, weights=memory.weights - spared)


def prompt_length(row: Row) -> int:
    return sum(label == IGNORED for label in row.labels)


def tokens_of(rows: Sequence[Row]) -> int:
    return sum(len(row.input_ids) for row in rows)


def per_text(texts: Sequence[list[int]], size: int) -> float:
    """Tokens that are computed for each text, in batches of which each computes a common beginning once."""
    return fmean(map(len, texts)) - common_prefix_length(texts) * (1 - 1 / size)
