"""Checks that find what is certain to stop a run, before its first vote is asked for.

Each is the stage's own, made early: it raises the error that the stage would raise hours later. Before
rows are labelled, RL is checked with all of them as System 2: with fewer it would fail, too. The checks of a
stage are in its description; here are those that several stages make.
"""

import os
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path

from stages import sandbox as sandboxes
from stages.config import Config, RlSection, ScoreSection, SftSection
from stages.errors import DataError, LoraparError, OutputError
from stages.labelling.known import known_labels
from stages.models import load_errors
from stages.pipeline.stage import TRAIN, Check, section
from stages.pipeline.state import current_artifact
from stages.pipeline.steps import Step
from stages.plan.texts import Texts
from stages.records import Labelled, read_labels
from stages.runtime import ranks


def problems(texts: Texts, steps: list[Step]) -> list[str]:
    """Everything that is certain to stop these steps, which are those that a run would do, each by name."""
    by_message: dict[str, tuple[str, dict[str, None]]] = {}
    for name, check in _checks(texts, steps):
        try:
            check()
        except LoraparError as error:
            summary, *rows = str(error).splitlines()
            such_as = f", such as {rows[0].strip()}" if rows else ""
            hint = f"\n    {error.hint}" if error.hint else ""
            problem = f"{summary.removesuffix(':')}{such_as}{hint}"
            by_message.setdefault(str(error), (problem, {}))[1][name] = None
    return [f"{', '.join(names)}: {problem}" for problem, names in by_message.values()]


def require_no_problem(texts: Texts, steps: list[Step]) -> None:
    """Raise DataError with everything that is certain to stop one of these steps, if there is anything."""
    if certain := problems(texts, steps):
        number = "1 thing is" if len(certain) == 1 else f"{len(certain)} things are"
        raise DataError("\n  ".join([f"{number} certain to stop this run", *certain]))


def _checks(texts: Texts, steps: list[Step]) -> Iterator[tuple[str, Check]]:
    """The checks of these steps, with the name of the step that fails if the call raises an error."""
    config = texts.config
    texts.labels = _labels(texts, steps)
    yield steps[0].stage.name, partial(_check_folder, Path(config.runs_dir))
    for step in steps:
        if step.planned.holds_base:
            yield step.name, lambda: texts.base
        if "model" in step.planned.sections:
            yield step.name, partial(load_errors.check_model, config.model)
        of_training = _of_training(config, getattr(config, step.stage.name, None))
        for check in (*of_training, *step.stage.checks(texts, step)):
            yield step.name, check
    sections = {path: step.stage.name for step in steps for path in step.planned.sections}
    for path, stage in sections.items():
        if path.endswith(".sandbox"):
            yield stage, partial(sandboxes.from_settings, section(config, path)[1], lambda text: None)


def _of_training(config: Config, stage: object) -> Iterator[Check]:
    """The checks of a stage that computes gradients. stage: its section."""
    from stages.lora.training.loop import accumulation_steps

    if isinstance(stage, ScoreSection | SftSection | RlSection):
        yield partial(load_errors.check_trainable, config.model)
    if isinstance(stage, SftSection | RlSection):
        processes, rl = config.launch.processes, config.rl
        yield partial(load_errors.check_training, stage)
        yield partial(ranks.check_gpus, processes)
        samples = rl.prompts_per_step * rl.num_generations if stage is rl else config.sft.batch_size
        yield partial(accumulation_steps, samples, stage.per_device_train_batch_size, processes)


def _check_folder(runs: Path) -> None:
    """Raise OutputError if artifacts cannot be written there."""
    runs = next(folder for folder in (runs, *runs.absolute().parents) if folder.exists())
    if not runs.is_dir() or not os.access(runs, os.W_OK):
        raise OutputError(f"runs_dir: {runs} is no folder to write in", "name another one")


def _labels(texts: Texts, steps: list[Step]) -> list[Labelled]:
    """The labels of the training rows; none if they are still to be made, unless the rows bring them."""
    config = texts.config
    labelling = next(filter(None, (step.inputs.get("classify:train") for step in steps)), None)
    if labelling and (artifact := current_artifact(texts.store, labelling)):
        return read_labels(artifact.path / "labels.jsonl")
    if config.classify.strategy == "known":
        with suppress(LoraparError):  # which the check of classify raises
            return known_labels(texts.rows[TRAIN], config.classify)
    return []
