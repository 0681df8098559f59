"""Each voter votes System 1 or 2 on each example; votes become labels, and a report describes them.

Votes are journalled per voter in `votes/`, below the folder of all runs rather than in one of them. No
request with an answer in its journal is sent again. So a new voter or sample adds only its own requests, and
a killed run continues where it was.
"""

from __future__ import annotations

import logging
import random
import threading
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from stages.classify import report
from stages.config import (
    UNVOTED,
    BenchmarkSection,
    ClassifySection,
    DataSection,
    ModelSection,
    ServerSection,
    Voter,
)
from stages.data.rows import read
from stages.engines import EngineCache, EngineSpec
from stages.errors import ConfigError, DataError
from stages.evaluation.benchmarks import benchmarks
from stages.labelling.aggregate import VoterResult, aggregate
from stages.labelling.calibration import MIN_EXAMPLES, Calibration, calibrate
from stages.labelling.known import with_known_labels
from stages.labelling.personas import (
    CONTENT_FREE,
    CalibrationExample,
    as_example,
    content_free,
    held_out,
    persona_context,
    personas,
)
from stages.labelling.votes import VoteJournal
from stages.models.dtype import answer_dtype
from stages.pipeline.context import StageContext
from stages.records import Example, Labelled, write_labels
from stages.runtime.background import in_background

log = logging.getLogger(__name__)

PATIENCE = 10
"""A voter with more than this many bad answers beyond the allowed ones gets no further requests."""


def run(
    context: StageContext,
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
    brings_labels = benchmark is not None and benchmark.brings_labels
    if brings_labels:
        classify = classify.model_copy(update={"strategy": "known", "labels_file": None, "swap": False})
    if classify.strategy in UNVOTED:
        # Training rows need labels; items of a benchmark only if it was said to bring them.
        required = benchmark is None or brings_labels
        rows = _swap_labels(_label_without_voters(examples, classify, required), classify)
        write_labels(context.out / "labels.jsonl", rows)
        return report.counts(rows)

    bare = sum(not example.response for example in examples)
    if bare and classify.show_answer:
        # Votes with and without an answer to look at have no threshold in common.
        log.info("%d of %d rows have no response, so voters see none", bare, len(examples))
        classify = classify.model_copy(update={"show_answer": False})
    labelled = held_out(classify.held_out)
    voter_logs = _voter_logs(model, classify, context)
    for voter_log in voter_logs:
        voter_log.set_examples(
            [*map(as_example, labelled), *_content_free_examples(voter_log.voter), *examples]
        )
    _collect_votes(voter_logs, model, classify, server, context)
    calibrations, voter_results = {}, {}
    for voter_log in voter_logs:
        voter_log.check(classify.max_failed, classify.max_invalid)
        calibration = _calibrate_voter(voter_log, labelled)
        probabilities = {example.id: voter_log.vote(example) for example in examples}
        calibrations[voter_log.title] = calibration
        voter_results[voter_log.title] = VoterResult(
            probabilities, calibration.threshold, voter_log.voter.weight
        )
    rows, with_thresholds, system2_ids = aggregate(examples, voter_results, classify)
    if classify.strategy == "shuffled":
        rows = _shuffle_labels(rows, classify.seed)
    rows = _swap_labels(rows, classify)
    write_labels(context.out / "labels.jsonl", rows)
    path, say = context.out / "report.json", context.progress.say
    return report.report(rows, voter_logs, with_thresholds, system2_ids, calibrations, classify, path, say)


def _label_without_voters(
    examples: list[Example], classify: ClassifySection, required: bool
) -> list[Labelled]:
    """Label by strategy known or random. required: raise DataError if no row has a known label."""
    if classify.strategy == "known":
        file = Path(classify.labels_file) if classify.labels_file else None
        return with_known_labels(examples, classify.known, file, required)
    generator, share = random.Random(classify.seed), classify.system2_share or 0.5
    return [Labelled(example, 2 if generator.random() < share else 1, {}) for example in examples]


def _shuffle_labels(rows: list[Labelled], seed: int) -> list[Labelled]:
    """Permute the labels over the rows that have one; undecided rows stay undecided."""
    systems = [row.system for row in rows if row.system]
    random.Random(seed).shuffle(systems)
    shuffled = iter(systems)
    return [replace(row, system=next(shuffled)) if row.system else row for row in rows]


def _swap_labels(rows: list[Labelled], classify: ClassifySection) -> list[Labelled]:
    """Exchange 1 and 2 if `classify.swap` says so."""
    if not classify.swap:
        return rows
    return [replace(row, system=None if row.system is None else 3 - row.system) for row in rows]


def _voter_logs(model: ModelSection, classify: ClassifySection, context: StageContext) -> list[VoteJournal]:
    """The VoteJournal of each voter, in the order of the config.

    Raises ConfigError for voters with one name, and for two addresses whose votes would share a journal.
    """
    voter_logs: list[VoteJournal] = []
    for voter, identity in zip(classify.voters, context.external_key["voters"], strict=True):
        voter_model = voter.voting_model(model)
        name = voter.name or f"{voter_model.title}/{voter.persona}"
        if any(voter_log.title == name for voter_log in voter_logs):
            raise ConfigError(f"classify.voters: two voters are named {name}", "give each another name")
        if voter.thinking and not personas.has_trait(voter.persona, "chat"):
            raise ConfigError(
                f"classify.voters: thinking needs a chat persona, and {voter.persona} is not one"
            )
        persona = persona_context(voter, model.title, classify.show_answer)
        # A model's precision changes its votes. It is known for models that run here, not for remote servers.
        if not voter.urls:
            identity = f"{identity} {answer_dtype(voter_model, voter.engine)}"
        voter_log = VoteJournal(
            voter, name, voter_model.title, identity, persona, classify.seed, context.journals / "votes"
        )
        for earlier in voter_logs:
            if voter_log.same_journal(earlier) and voter.urls != earlier.voter.urls:
                raise ConfigError(
                    f"classify.voters: {earlier.title} and {name} have one model and persona, but other URLs",
                    "if it is one model, give one voter both: base_url: [URL, URL]; else rename one of them",
                )
        voter_logs.append(voter_log)
    return voter_logs


def _collect_votes(
    voter_logs: list[VoteJournal],
    model: ModelSection,
    classify: ClassifySection,
    server: ServerSection,
    context: StageContext,
) -> None:
    """Have every voter answer the requests that its journal lacks.

    Voters in this process and voters whose server has no `devices` answer one after another, in the lane "".
    Voters of one model follow each other, so that the model is loaded once. Each group of devices and each
    remote server has a separate lane, a thread, and all lanes run side by side.
    """
    progress = context.progress
    missing = {voter_log.title: len(voter_log.missing()) for voter_log in voter_logs}
    lanes: dict[str, list[VoteJournal]] = {}
    for voter_log in voter_logs:
        if missing[voter_log.title]:
            lanes.setdefault(str(voter_log.voter.urls or voter_log.voter.devices or ""), []).append(voter_log)
        else:
            progress.say(f"{voter_log.title}: all votes are in its journal")
    stop, begin = threading.Event(), _Once(lambda: progress.start("votes", sum(missing.values())))

    def run_lane(lane: list[VoteJournal], engine_cache: EngineCache) -> None:
        for voter_log in sorted(lane, key=_model_of):
            # No variable for the engine: it would keep the engine in memory while the next one is loaded.
            votes = voter_log.ask(
                engine_cache.get(_engine_spec(voter_log.voter, model), server, progress.say), progress.say
            )
            begin()
            # Closed on errors, too, whose traceback would keep the generator, and with it the journal's lock.
            with closing(votes):
                for number, _ in enumerate(votes, 1):
                    failed = f", {len(voter_log.failures)} failed" if voter_log.failures else ""
                    progress.advance(1, f"{voter_log.title} {number}/{missing[voter_log.title]}{failed}")
                    voter_log.check(classify.max_failed, classify.max_invalid, PATIENCE)
                    if stop.is_set():
                        return

    def run_separate_lane(lane: list[VoteJournal]) -> None:
        with EngineCache() as engine_cache:
            run_lane(lane, engine_cache)

    main_lane = lanes.pop("", [])
    with in_background([partial(run_separate_lane, lane) for lane in lanes.values()], stop):
        run_lane(main_lane, context.engines)


class _Once:
    """Calls a function at most once, however many threads ask for it."""

    def __init__(self, call: Callable[[], None]) -> None:
        self._call, self._lock, self._done = call, threading.Lock(), False

    def __call__(self) -> None:
        with self._lock:
            if not self._done:
                self._done = True
                self._call()


def _model_of(voter_log: VoteJournal) -> tuple[str, ...]:
    """Sort key that brings together the voters that one engine answers for, so that it is loaded once."""
    voter = voter_log.voter
    return voter.model or "", voter.revision, voter.engine, str(voter.vllm)


def _engine_spec(voter: Voter, model: ModelSection) -> EngineSpec:
    return EngineSpec(
        voter.engine,
        voter.voting_model(model),
        None,
        voter.urls,
        voter.api_key_env,
        voter.vllm,
        voter.devices,
    )


def _calibrate_voter(voter_log: VoteJournal, labelled: list[CalibrationExample]) -> Calibration:
    """Calibrate a voter by the labelled examples that are not in its prompt."""
    in_prompt = {row.question for row in voter_log.context.shots}
    unseen = [row for row in labelled if row.question not in in_prompt]
    method = voter_log.voter.calibration
    if method == "auto":
        method = "none" if personas.has_trait(voter_log.voter.persona, "chat") else "held_out"
    of_system = [sum(row.system == system for row in unseen) for system in (1, 2)]
    if method == "held_out" and (len(unseen) < MIN_EXAMPLES or not all(of_system)):
        raise DataError(
            f"{voter_log.title}: {of_system[0]} System 1 and {of_system[1]} System 2 labelled examples "
            f"outside its prompt, and calibration needs {MIN_EXAMPLES} in all and some of each",
            "more of them in classify.held_out, or calibration: none",
        )
    votes = [voter_log.vote(as_example(row)) for row in unseen]
    content_free_votes = [voter_log.vote(example) for example in _content_free_examples(voter_log.voter)]
    return calibrate(method, unseen, votes, content_free_votes)


def _content_free_examples(voter: Voter) -> list[Example]:
    return [content_free(text) for text in CONTENT_FREE] if voter.calibration == "content_free" else []
