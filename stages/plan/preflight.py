"""Checks that find what is certain to stop a run, before its first vote is asked for.

Each is the stage's own, made early: it raises the error that the stage would raise hours later. Before
rows are labelled, RL is checked with all of them as System 2: with fewer it would fail, too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

from stages import sandbox as sandboxes
from stages.config import Config
from stages.config.sources import ALL_LINEAR
from stages.errors import DataError, LoraparError
from stages.evaluation.benchmarks import benchmarks
from stages.lora.adapter import adapter
from stages.lora.grpo import vllm_rollouts
from stages.lora.grpo.prompts import RlPrompts, row_fields
from stages.lora.training import loop
from stages.models import base
from stages.models.load_errors import load_config
from stages.pipeline.stages import section
from stages.pipeline.state import state
from stages.pipeline.steps import Step
from stages.plan.lengths import Span, sampled
from stages.plan.prompt_lengths import TRAINING_SAMPLE, Texts, spans
from stages.prompts.renderer import Renderer
from stages.records import Labelled, examples_of_system, labelled_examples, read_labels
from stages.rewards import loading
from stages.store.artifacts import Store


@dataclass(frozen=True)
class CertainFailure:
    """An error that is certain."""

    stopped: tuple[str, ...]
    """Names of the steps that it would stop, or what is too long to be read."""
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
        if stage in ("sft", "rl"):
            training = getattr(config, stage)
            yield name, partial(loop.check_machine, training, training.launch.is_distributed)
        if stage == "rl":
            yield name, partial(vllm_rollouts.check_machine, config.rl.rollouts)
            yield name, partial(_check_rl_prompts, texts, labels)
        if stage == "eval":
            kind = config.eval.benchmarks[step.variant.partition("@")[2]].kind
            yield name, getattr(benchmarks.pick(kind), "check_installed", lambda: None)
        if stage in ("score", "sft") and "classify:train" in step.inputs:
            yield from _checks_of_rows(step, texts, labels)
    sections = {path: step.stage.name for step in steps for path in step.stage.sections(config, step.variant)}
    for path, stage in sections.items():
        if path.endswith(".sandbox"):
            yield stage, partial(sandboxes.from_settings, section(config, path)[1], lambda text: None)
    for span in spans(texts, [step for step in steps if step.stage.name in ("classify", "eval")]):
        if span.fails:
            yield span.name, partial(_refuse, span)


def _checks_of_rows(step: Step, texts: Texts, labels: list[Labelled]) -> Iterator[Check]:
    """Yield the checks of the rows that score or SFT would read: their lengths, and enough of each system."""
    config, stage = texts.config, step.stage.name
    examples = labelled_examples(labels) if labels else texts.rows["train"]
    rows = _renderer(texts, stage, labels).rows
    yield step.name, partial(rows, sampled(examples, TRAINING_SAMPLE), config.data)
    systems = (1, 2) if stage == "score" else (1,) if config.sft.data == "system1" else ()
    for system in systems if labels else ():
        yield step.name, partial(examples_of_system, labels, system)


def _refuse(span: Span) -> None:
    limit = f"{span.limit} tokens ({span.setting.removesuffix(':')})"
    raise DataError(f"{span.longer} of {span.rows} are longer than {limit}", "raise server.max_model_len")


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
    """ConfigError unless the base has the modules of `lora.target_modules`; its weights are not loaded."""
    import torch
    from transformers import AutoModelForCausalLM

    if config.lora.target_modules == [ALL_LINEAR]:
        return
    with torch.device("meta"):
        adapter.with_targets(AutoModelForCausalLM.from_config(load_config(config.model)), config.lora)


def _check_rl_prompts(texts: Texts, labels: list[Labelled]) -> None:
    """Raise the error that RL would raise about its rows."""
    rl = texts.config.rl
    functions = {name: loading.load(name, rl.rewards_file) for name in rl.rewards}
    renderer = _renderer(texts, "rl", labels)
    if not labels:
        # Only System 2 rows need the fields that rewards read, and which rows those are is not known yet.
        needed = {name: loading.required_fields(name, function) for name, function in functions.items()}
        rows = sampled(texts.rows["train"], TRAINING_SAMPLE)
        complete = [row for row in rows if not loading.missing_fields(needed, [row_fields(row, renderer)])]
        labels = [Labelled(row, 2, {}) for row in complete or rows]
        slow = rl.prompts_per_step - rl.replay_prompts
        rl = rl.model_copy(update={"system1_share": 0.0, "prompts_per_step": slow})
    RlPrompts.of(labels, renderer, rl, functions, texts.config.seed)
