"""classify: each voter votes System 1 or 2 on each example; votes become labels, and a report describes them.

Votes are journalled per voter in `votes/`, below the folder of all runs rather than in one of them. No
question with an answer in its journal is asked again. So a new voter or sample adds only its own questions,
and a killed run continues where it was.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from stages.config import BenchmarkSection, ClassifySection, DataSection, ModelSection, ServerSection, Voter
from stages.data.rows import read
from stages.engines import EngineCache, EngineSpec
from stages.errors import ConfigError, DataError
from stages.evaluation.benchmarks import benchmarks
from stages.labelling import known, report
from stages.labelling.aggregate import VoterResult, aggregate
from stages.labelling.calibration import LEAST_EXAMPLES, Calibration, calibrate
from stages.labelling.personas import (
    CONTENT_FREE,
    CalibrationExample,
    as_example,
    empty,
    held_out,
    persona_context,
    personas,
)
from stages.labelling.votes import VoterLog
from stages.models.dtype import resolve
from stages.pipeline.context import StageContext
from stages.records import Example, Labelled, write_labels
from stages.runtime.background import in_background

PATIENCE = 10
"""A voter with this many bad answers more than allowed is not asked further questions."""


def run(
    job: StageContext,
    model: ModelSection,
    classify: ClassifySection,
    server: ServerSection,
    data: DataSection | None = None,
    benchmark: BenchmarkSection | None = None,
) -> dict[str, Any]:
    """Write `labels.jsonl` and `report.json`; returns the counts.

    labels.jsonl has every example of `data`, or of `benchmark`, with its label and votes. Without voters
    there is no report.
    """
    examples = benchmarks.pick(benchmark.kind).load(benchmark) if benchmark else read(data or DataSection())
    if benchmark and benchmark.label == "known":
        classify = classify.model_copy(update={"strategy": "known", "labels_file": None})
    if classify.strategy != "vote":
        needed = benchmark is None or benchmark.label == "known"
        rows = _swapped(_unvoted(examples, classify, needed), classify)
        write_labels(job.out / "labels.jsonl", rows)
        return report.counts(rows)

    judged = held_out(classify.held_out)
    boxes = _boxes(model, classify, job)
    for box in boxes:
        box.take([*map(as_example, judged), *_free(box.voter), *examples])
    _ask_all(boxes, model, classify, server, job)
    voices, found = {}, {}
    for box in boxes:
        box.check(classify.max_failed, classify.max_invalid)
        found[box.title] = _calibrated(box, judged)
        given = {e.id: box.vote(e) for e in examples}
        voices[box.title] = VoterResult(given, found[box.title].threshold, box.voter.weight)
    rows, held, twos = aggregate(examples, voices, classify)
    written = _swapped(rows, classify)
    write_labels(job.out / "labels.jsonl", written)
    return report.report(
        written, boxes, held, twos, found, classify, job.out / "report.json", job.progress.say
    )


def _unvoted(examples: list[Example], classify: ClassifySection, needed: bool) -> list[Labelled]:
    """Labels that no voter gave. needed: it is an error if no row has one."""
    if classify.strategy == "known":
        file = Path(classify.labels_file) if classify.labels_file else None
        return known.labelled(examples, classify.known, file, needed=needed)
    draw, share = random.Random(classify.seed), classify.system2_share or 0.5
    return [Labelled(example, 2 if draw.random() < share else 1, {}) for example in examples]


def _swapped(rows: list[Labelled], classify: ClassifySection) -> list[Labelled]:
    """The rows as labelled, or with 1 and 2 exchanged."""
    if not classify.swap:
        return rows
    return [replace(row, system=None if row.system is None else 3 - row.system) for row in rows]


def _boxes(model: ModelSection, classify: ClassifySection, job: StageContext) -> list[VoterLog]:
    """The Votes of each voter, in the order of the config."""
    boxes: list[VoterLog] = []
    for voter, identity in zip(classify.voters, job.outside["voters"], strict=True):
        asked = voter.asks(model)
        name = voter.name or f"{asked.title}/{voter.persona}"
        if any(box.title == name for box in boxes):
            raise ConfigError(f"classify.voters: two voters are {name}", "give each another name")
        if voter.thinking and not personas.has(voter.persona, "chat"):
            raise ConfigError(
                f"classify.voters: persona {voter.persona} is no chat, in which thinking takes place"
            )
        brief = persona_context(voter, model.title, classify.show_answer)
        # A model's data type changes its votes. It is known for models that run here, not for remote servers.
        answering = identity if voter.urls else f"{identity} {resolve(asked)}"
        box = VoterLog(voter, name, asked.title, answering, brief, classify.seed, job.journals / "votes")
        for other in boxes:
            if box.same_journal(other) and voter.urls != other.voter.urls:
                raise ConfigError(
                    f"classify.voters: {other.title} and {name} are one model and persona at two addresses",
                    "of one model, name both in one base_url: [URL, URL]; else serve it under another name",
                )
        boxes.append(box)
    return boxes


def _ask_all(
    boxes: list[VoterLog],
    model: ModelSection,
    classify: ClassifySection,
    server: ServerSection,
    job: StageContext,
) -> None:
    """Have every voter answer the questions that its journal lacks.

    Voters in this process and voters whose server has no `devices` are asked one after another. Voters of one
    model follow each other, so that the model is loaded once. Each group of devices and each remote server
    has a separate lane, a thread, and all lanes run side by side.
    """
    progress = job.progress
    wanted = {box.title: len(box.missing()) for box in boxes}
    lanes: dict[str, list[VoterLog]] = {}
    for box in boxes:
        if wanted[box.title]:
            lanes.setdefault(str(box.voter.urls or box.voter.devices or ""), []).append(box)
        else:
            progress.say(f"{box.title}: all votes are in its journal")
    stop, begin = threading.Event(), _Once(lambda: progress.start("votes", sum(wanted.values())))

    def lane(boxes: list[VoterLog], pool: EngineCache) -> None:
        for box in sorted(boxes, key=lambda box: (box.voter.model or "", str(box.voter.vllm))):
            # No name for the engine, which would keep it in memory beside the next.
            asked = box.ask(pool.get(_served(box.voter, model), server, progress.say), progress.say)
            begin()
            with closing(asked):  # an error would keep it, and with it the lock of the journal
                for number, _ in enumerate(asked, 1):
                    failed = f", {len(box.failures)} failed" if box.failures else ""
                    progress.advance(1, f"{box.title} {number}/{wanted[box.title]}{failed}")
                    box.check(classify.max_failed, classify.max_invalid, PATIENCE)
                    if stop.is_set():
                        return

    def alone(boxes: list[VoterLog]) -> None:
        with EngineCache() as pool:
            lane(boxes, pool)

    own = lanes.pop("", [])
    with in_background([partial(alone, found) for found in lanes.values()], stop):
        lane(own, job.engines)


class _Once:
    """Calls a function once, however many threads ask for it."""

    def __init__(self, call: Callable[[], None]) -> None:
        self._call, self._lock, self._done = call, threading.Lock(), False

    def __call__(self) -> None:
        with self._lock:
            if not self._done:
                self._done = True
                self._call()


def _served(voter: Voter, model: ModelSection) -> EngineSpec:
    asked = voter.asks(model)
    return EngineSpec(voter.engine, asked, None, voter.urls, voter.api_key_env, voter.vllm, voter.devices)


def _calibrated(box: VoterLog, judged: list[CalibrationExample]) -> Calibration:
    """The calibration of a voter, from the labelled examples that are not in its prompt."""
    shown = {row.question for row in box.brief.shots}
    apart = [row for row in judged if row.question not in shown]
    method = box.voter.calibration
    if method == "auto":
        method = "none" if personas.has(box.voter.persona, "chat") else "held_out"
    if method == "held_out" and len(apart) < LEAST_EXAMPLES:
        raise DataError(
            f"{box.title}: {len(apart)} labelled examples outside of its prompt, "
            f"and calibration needs {LEAST_EXAMPLES}",
            "more of them in classify.held_out, or calibration: none",
        )
    given = [box.vote(as_example(row)) for row in apart]
    return calibrate(method, apart, given, [box.vote(example) for example in _free(box.voter)])


def _free(voter: Voter) -> list[Example]:
    return [empty(text) for text in CONTENT_FREE] if voter.calibration == "content_free" else []
