"""Checks that find what is certain to stop a run, before its first vote is asked for.

Each is the stage's own, made early: it raises the error that the stage would raise hours later. Before
rows are labelled, RL is checked with all of them as System 2: with fewer it would fail, too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from stages import sandbox as sandboxes
from stages.config import Config, RlSection, SftSection
from stages.config.sources import ALL_LINEAR
from stages.errors import DataError, LoraparError
from stages.evaluation.benchmarks import benchmarks
from stages.labelling.known import with_known_labels
from stages.lora import examples
from stages.lora.adapter import adapter
from stages.lora.grpo import building, gradients, vllm_rollouts
from stages.lora.grpo.prompts import RlPrompts, row_fields
from stages.lora.training import loop
from stages.models import base
from stages.pipeline import launch
from stages.pipeline.stages import rescored_by_rollouts, section
from stages.pipeline.state import state
from stages.pipeline.steps import Step
from stages.plan.lengths import sampled
from stages.plan.prompt_lengths import TRAINING_SAMPLE, Texts, spans
from stages.prompts.renderer import Renderer
from stages.records import Example, Labelled, read_labels
from stages.rewards import loading
from stages.store.artifacts import Store


@dataclass(frozen=True)
class CertainFailure:
    """An error that is certain."""

    stopped: tuple[str, ...]
    """Names of the steps that it would stop."""
    error: LoraparError

    def __str__(self) -> str:
        summary, *rows = str(self.error).splitlines()
        such_as = f", such as {rows[0].strip()}" if rows else ""
        hint = f"\n    {self.error.hint}" if self.error.hint else ""
        return f"{', '.join(self.stopped)}: {summary.removesuffix(':')}{such_as}{hint}"


def problems(config: Config, steps: list[Step]) -> list[CertainFailure]:
    """Everything that is certain to stop these steps, which are those that a run would do."""
    by_message: dict[str, tuple[LoraparError, list[str]]] = {}
    for name, check in _checks(config, steps):
        try:
            check()
        except LoraparError as error:
            by_message.setdefault(str(error), (error, []))[1].append(name)
    return [CertainFailure(tuple(dict.fromkeys(names)), error) for error, names in by_message.values()]


def require_no_problem(config: Config, steps: list[Step]) -> None:
    """Raise DataError with everything that is certain to stop one of these steps, if there is anything."""
    if certain := problems(config, steps):
        number = "1 thing is" if len(certain) == 1 else f"{len(certain)} things are"
        raise DataError("\n  ".join([f"{number} certain to stop this run", *map(str, certain)]))


Check = tuple[str, Callable[[], object]]
"""Name of the step that fails if the call raises an error."""


def _checks(config: Config, steps: list[Step]) -> Iterator[Check]:
    texts = Texts(config)
    labels = _current_labels(config, steps)
    for step in steps:
        stage, name = step.stage.name, step.name
        if "model" in step.stage.sections(config, step.variant):
            yield name, partial(base.check_machine, config.model)
        if name == "score":
            yield name, partial(_check_targets, config)
        if name == f"score:{examples.PROTECTED}":
            yield name, partial(_check_protected, texts)
        if name == "score:rl" and rescored_by_rollouts(config):
            launched = config.score.launch.is_distributed
            yield name, partial(loop.check_machine, config.rl, launched)
            yield name, partial(_check_shares, gradients.without_updates(config.rl, config.score.launch))
        if stage == "classify" and config.labelling_strategy(step.variant) == "known":
            yield name, partial(_check_labels, config, texts.rows[step.variant], step.variant)
        if stage in ("score", "sft", "rl"):
            yield name, partial(base.check_trainable, config.model)
        if stage in ("score", "sft", "rl") and getattr(config, stage).launch.is_distributed:
            yield name, partial(launch.command, getattr(config, stage).launch)
        if stage in ("sft", "rl"):
            training = getattr(config, stage)
            yield name, partial(loop.check_machine, training, training.launch.is_distributed)
            yield name, partial(_check_shares, training)
        if stage == "rl":
            yield name, partial(vllm_rollouts.check_machine, config.rl.rollouts)
            yield name, partial(_check_rl_prompts, texts, labels)
        if stage == "eval":
            kind = config.eval.benchmarks[step.variant.partition("@")[2]].kind
            yield name, getattr(benchmarks.pick(kind), "check_installed", lambda: None)
        if stage in ("score", "sft") and "classify:train" in step.inputs:
            yield name, partial(_check_rows, texts, step, labels)
        if stage in ("classify", "eval"):
            yield name, partial(_check_prompts, texts, step)
    sections = {path: step.stage.name for step in steps for path in step.stage.sections(config, step.variant)}
    for path, stage in sections.items():
        if path.endswith(".sandbox"):
            yield stage, partial(sandboxes.from_settings, section(config, path)[1], lambda text: None)


def _check_labels(config: Config, examples: list[Example], variant: str) -> None:
    """Raise the error that classify would raise about known labels."""
    benchmark, file = config.eval.benchmarks.get(variant), config.classify.labels_file
    brings_labels = benchmark is not None and benchmark.brings_labels
    path = Path(file) if file and not brings_labels else None
    with_known_labels(examples, config.classify.known, path, benchmark is None or brings_labels)


def _check_rows(texts: Texts, step: Step, labels: list[Labelled]) -> None:
    """Raise the error that score or SFT would raise about its rows: one too long, or a system without any.

    Before rows are labelled any of them may be read, and with `data.too_long: error` each must fit.
    """
    config, stage = texts.config, step.stage.name
    if not labels:
        # SFT may shorten the responses of System 1. Score reads them whole.
        rows = [Labelled(row, 1 if step.name == "sft" else 2, {}) for row in texts.rows["train"]]
        every_row = config.sft.model_copy(update={"data": "all"})
        chosen = [examples.trained_by_sft(rows, every_row, config.seed)]
    elif stage == "score":
        chosen = list(examples.scored(labels, config.score, config.seed).values())
    else:
        chosen = [examples.trained_by_sft(labels, config.sft, config.seed, step.variant)]
    for some in chosen:
        _renderer(texts, stage, labels).rows(sampled(some, TRAINING_SAMPLE), config.data)


def _check_shares(training: SftSection | RlSection) -> None:
    """Raise ConfigError if the processes of this machine cannot share the samples of a step evenly."""
    launching = training.launch
    if launching.backend == "single" or launching.config is not None:  # that file says how many there are
        return
    if isinstance(training, RlSection):
        samples = training.prompts_per_step * training.num_generations
    else:
        samples = training.batch_size
    processes, _ = launch.processes(launching)
    loop.accumulation_steps(samples, training.per_device_train_batch_size, processes)


def _check_protected(texts: Texts) -> None:
    """Raise the error that scoring the protected rows would raise about their file, or a row too long."""
    config = texts.config
    assert config.partition.protect is not None
    rows, _, _ = examples.protected(config.partition.protect, config.score, config.seed)
    _renderer(texts, "score", []).rows(rows, config.data)


def _check_prompts(texts: Texts, step: Step) -> None:
    """Raise DataError if more prompts of voters or a benchmark than may fail are too long for a server."""
    for span in spans(texts, [step]):
        if span.fails:
            limit = f"{span.limit} tokens ({span.setting.removesuffix(':')})"
            served = span.setting.startswith("server.")
            raise DataError(
                f"{span.name}: {span.longer} of {span.rows} are longer than {limit}",
                "raise server.max_model_len" if served else "fewer shots, or another model",
            )


def _current_labels(config: Config, steps: list[Step]) -> list[Labelled]:
    """The labels of the training rows; none if they are still to be made."""
    labelling = next(
        (step.inputs[name] for step in steps for name in step.inputs if name == "classify:train"), None
    )
    now = labelling and state(Store(config.root), labelling)
    if not now or now.state != "current" or now.artifact is None:
        return []
    return read_labels(now.artifact.path / "labels.jsonl")


def _renderer(texts: Texts, stage: str, labels: list[Labelled]) -> Renderer:
    return Renderer(texts.tokenizer, getattr(texts.config, stage).prompt or texts.config.prompt, labels)


def _check_targets(config: Config) -> None:
    """Raise ConfigError unless the base, whose weights are not loaded, has the target modules."""
    if config.lora.target_modules != [ALL_LINEAR]:
        adapter.with_targets(base.without_weights(config.model), config.lora)


def _check_rl_prompts(texts: Texts, labels: list[Labelled]) -> None:
    """Raise the error that RL would raise about its rows."""
    rl = texts.config.rl
    functions = {name: loading.load(name, rl.rewards_file) for name in rl.rewards}
    renderer, known = _renderer(texts, "rl", labels), bool(labels)
    if not known:
        # Only System 2 rows need the fields that rewards read, and which rows those are is not known yet.
        needed = {name: loading.required_fields(name, function) for name, function in functions.items()}
        rows = sampled(texts.rows["train"], TRAINING_SAMPLE)
        complete = [row for row in rows if not loading.missing_fields(needed, [row_fields(row, renderer)])]
        labels = [Labelled(row, 2, {}) for row in complete or rows]
        slow = rl.prompts_per_step - rl.replay_prompts
        if len(labels) < slow <= len(texts.rows["train"]):
            return  # a sample cannot tell
        rl = rl.model_copy(update={"system1_share": 0.0, "prompts_per_step": slow})
    prompts = RlPrompts.from_labels(labels, renderer, rl, functions, texts.config.seed)
    if known:
        building.optimizer_steps(prompts, rl)
