"""The examples that score and SFT read: labelled ones, and protected ones."""

import logging
import random
from dataclasses import replace
from typing import Any

from stages.config import AUTO, FAST, SLOW, ModesSection, ScoreSection, SftSection, SourceSection
from stages.data.rows import read
from stages.errors import DataError
from stages.prompts.answers import equals_gold
from stages.records import Example, Labelled, examples_of_system, labelled_examples

log = logging.getLogger(__name__)

PROTECTED = "protected"
"""The rows of `partition.protect`: as a variant of score, and as a prefix in its file."""
_SFT_WITHOUT = {1: "sft.data=all", 2: "sft.system2_share=0"}
"""System → settings with which SFT needs no response of its rows."""


def with_response(labels: list[Labelled]) -> list[Labelled]:
    """The rows that can be imitated."""
    return [row for row in labels if row.example.response]


def scored(labels: list[Labelled], score: ScoreSection, seed: int) -> tuple[dict[Any, list[Example]], int]:
    """A random sample of each system's examples that have a response, and how many rows have none.

    DataError if a system has no such example.
    """
    samples = {}
    for system in (1, 2):
        examples = _examples_with_response(labels, system)
        number = min(score.examples, len(examples))
        samples[system] = random.Random(f"{seed} score {system}").sample(examples, number)
    return samples, len(labels) - len(with_response(labels))


def protected(path: str, score: ScoreSection, seed: int) -> tuple[dict[Any, list[Example]], int]:
    """As `scored`, of the rows of `partition.protect`; DataError if none has a response."""
    rows = read(SourceSection(path=path, empty="drop", duplicates="first"))
    answered = [example for example in rows if example.response]
    if not answered:
        raise DataError(
            f"none of {len(rows)} rows of partition.protect, {path}, has a response",
            "importance is that of responses: name rows with the answers to keep",
        )
    number = min(score.examples, len(answered))
    sample = random.Random(f"{seed} protected").sample(answered, number)
    return {PROTECTED: sample}, len(rows) - len(answered)


def bare(example: Example) -> Example:
    """The example answered at once: without its thought, and by its final answer alone if it has one."""
    response = example.response if example.gold is None else f"#### {example.gold}"
    return replace(example, response=response, thought="")


def is_worked(example: Example) -> bool:
    """True if an example's response has more in it than the final answer."""
    response = example.response.replace("####", "").strip()
    return bool(example.thought or (response and not (example.gold and equals_gold(response, example.gold))))


def trained_by_sft(
    labels: list[Labelled], sft: SftSection, modes: ModesSection | None, seed: int
) -> dict[str, list[Example]]:
    """The examples that SFT imitates, by the mode in which they are asked: see `ModesSection`.

    Without modes they are under "": System 1's with the cold start's of System 2, or all labelled ones, in
    file order. DataError if there is nothing to imitate.
    """
    if modes is not None:
        return _by_mode(labels, modes, seed)
    if sft.system1_targets == "answer":
        labels = [replace(row, example=bare(row.example)) if row.system == 1 else row for row in labels]
    if sft.data == "all":
        if labels and not (labels := with_response(labels)):
            raise DataError(
                "no row has a response for SFT to imitate",
                "RL alone: partition.strategy=all, rl.start_from=init, eval.targets=[base, rl]",
            )
        labelled_examples(labels)  # raises the error about labels that are all undecided
        return {"": [_imitated(row) for row in labels if row.system]}
    system1 = _examples_with_response(labels, 1)
    if sft.system1_targets == "answer" and not any(example.gold for example in system1):
        raise DataError(
            f"sft.system1_targets is answer, and none of {len(system1)} System 1 rows has a verifiable "
            "answer",
            "rows need `gold`, or a response that ends in `#### answer`",
        )
    cold_rows = round(sft.system2_share * len(system1))
    system2 = _examples_with_response(labels, 2) if cold_rows else []
    if cold_rows > len(system2):
        log.warning(
            "sft.system2_share %s asks for %d System 2 rows, and %d have a response",
            sft.system2_share,
            cold_rows,
            len(system2),
        )
    cold_start = random.Random(f"{seed} cold start").sample(system2, min(cold_rows, len(system2)))
    chosen = {example.id: example for example in [*system1, *cold_start]}
    return {"": [chosen[row.example.id] for row in labels if row.example.id in chosen]}


def _by_mode(labels: list[Labelled], modes: ModesSection, seed: int) -> dict[str, list[Example]]:
    system1, system2 = (examples_of_system(labels, system) for system in (1, 2))
    # Where slow has arguments of the chat template it thinks, which a row without a thought would unteach.
    shows_working = (lambda row: bool(row.thought)) if modes.slow.chat_template_kwargs else is_worked
    at_once = [answered for answered in map(bare, system1) if answered.response]
    worked1, worked2 = (list(filter(shows_working, rows)) for rows in (system1, system2))
    number = round(modes.system1_under_slow * len(worked1))
    slow = [*random.Random(f"{seed} slow").sample(worked1, number), *worked2]
    if not at_once:
        raise DataError(
            f"none of {len(system1)} System 1 rows has an answer, which the mode fast learns",
            "rows need `gold`, or a response",
        )
    if not slow and not modes.slow.chat_template_kwargs:
        raise DataError(
            "no row shows how its answer is worked out, which the mode slow learns",
            "give some rows a response with more in it than the answer",
        )
    return {FAST: at_once, AUTO: [*at_once, *worked2], **({SLOW: slow} if slow else {})}


def _imitated(row: Labelled) -> Example:
    """The example as its system answers it: System 1 has no thought."""
    return replace(row.example, thought="") if row.system == 1 else row.example


def _examples_with_response(labels: list[Labelled], system: int) -> list[Example]:
    """The examples of a system that can be imitated; DataError if there is none."""
    examples = examples_of_system(labels, system)
    answered = [_imitated(row) for row in labels if row.system == system and row.example.response]
    if not answered:
        raise DataError(
            f"none of {len(examples)} rows labelled System {system} has a response",
            "score and SFT imitate responses: give some of these rows one, or choose partition.strategy=all "
            f"and {_SFT_WITHOUT[system]}",
        )
    return answered
