"""The examples that score and SFT read: labelled ones, and protected ones."""

from __future__ import annotations

import logging
import random
from dataclasses import replace
from typing import Any

from stages.config import ScoreSection, SftSection, SourceSection
from stages.data.rows import read
from stages.errors import DataError
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


def with_targets(labels: list[Labelled], sft: SftSection) -> list[Labelled]:
    """The rows with what SFT imitates as their response: that of System 1 may be its answer alone."""
    if sft.system1_targets != "answer":
        return labels
    return [
        replace(row, example=replace(row.example, response=f"#### {row.example.gold}"))
        if row.system == 1 and row.example.gold is not None
        else row
        for row in labels
    ]


def without_response(labels: list[Labelled], sft: SftSection) -> int:
    """Number of rows of the systems that SFT is for, cold start aside, that it cannot imitate."""
    systems = (1, 2) if sft.data == "all" else (1,)
    return sum(row.system in systems and not row.example.response for row in with_targets(labels, sft))


def trained_by_sft(labels: list[Labelled], sft: SftSection, seed: int) -> list[Example]:
    """The System 1 examples with the cold start's System 2 examples, or all labelled ones; in file order.

    Only those that have a response. DataError if System 1 is to answer at once and none of its rows has an
    answer to give.
    """
    labels = with_targets(labels, sft)
    if sft.data == "all":
        if labels and not (labels := with_response(labels)):
            raise DataError(
                "no row has a response for SFT to imitate",
                "RL alone: partition.strategy=all, rl.start_from=init, eval.targets=[base, rl]",
            )
        return labelled_examples(labels)
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
            sft.system2_share, cold_rows, len(system2),
        )  # fmt: skip
    cold_start = random.Random(f"{seed} cold start").sample(system2, min(cold_rows, len(system2)))
    chosen = {example.id for example in [*system1, *cold_start]}
    return [row.example for row in labels if row.example.id in chosen]


def _examples_with_response(labels: list[Labelled], system: int) -> list[Example]:
    """The examples of a system that can be imitated; DataError if there is none."""
    examples = examples_of_system(labels, system)
    answered = [example for example in examples if example.response]
    if not answered:
        raise DataError(
            f"none of {len(examples)} rows labelled System {system} has a response",
            "score and SFT imitate responses: give some of these rows one, or choose partition.strategy=all "
            f"and {_SFT_WITHOUT[system]}",
        )
    return answered
