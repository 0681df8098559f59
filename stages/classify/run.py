"""Each voter votes System 1 or 2 on each example; votes become labels, and a report describes them.

Votes are journalled per voter in `votes/`, below the folder of all runs rather than in one of them. No
request with an answer in its journal is sent again. So a new voter or sample adds only its own requests, and
a killed run continues where it was.
"""

import json
import logging
import random
import threading
from contextlib import closing
from functools import partial
from typing import Any

from stages.classify import report
from stages.config import UNVOTED, BenchmarkSection, ClassifySection, DataSection, ModelSection, ServerSection
from stages.data.rows import read
from stages.engines import EngineCache, EngineSpec
from stages.errors import ConfigError, DataError
from stages.evaluation.benchmarks import benchmarks
from stages.labelling.aggregate import MIN_EXAMPLES, Calibration, VoterResult, aggregate, calibrate
from stages.labelling.known import known_labels
from stages.labelling.personas import personas, question_of, read_labelled_examples, shots_of
from stages.labelling.votes import VoteJournal
from stages.models.dtype import answer_dtype
from stages.pipeline.context import StageContext
from stages.records import Labelled, write_labels
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
    """Write `labels.jsonl`, the label and votes of each example, and if voters voted `report.json`."""
    examples = benchmarks.pick(benchmark.kind).load(benchmark) if benchmark else read(data or DataSection())
    strategy = "known" if benchmark and benchmark.brings_labels else classify.strategy
    if strategy in UNVOTED:
        if strategy == "random":
            generator, share = random.Random(classify.seed), classify.system2_share or 0.5
            rows = [Labelled(example, 2 if generator.random() < share else 1, {}) for example in examples]
        else:
            rows = known_labels(examples, classify, benchmark)
        write_labels(context.out / "labels.jsonl", rows)
        return report.counts(rows)
    bare = sum(not example.response for example in examples)
    if bare and classify.show_answer:
        # Votes with and without an answer to look at have no threshold in common.
        log.info("%d of %d rows have no response, so voters see none", bare, len(examples))
        classify = classify.model_copy(update={"show_answer": False})
    labelled = read_labelled_examples(classify.held_out)
    journals = _journals(model, classify, context)
    for journal in journals:
        journal.set_examples([*(row.example for row in labelled), *examples])
    _collect_votes(journals, model, classify, server, context)
    calibrations, results = {}, {}
    for journal in journals:
        journal.check(classify.max_failed)
        calibrations[journal.title] = calibration = _calibrate_voter(journal, labelled)
        probabilities = {example.id: journal.vote(example) for example in examples}
        result = VoterResult(probabilities, calibration.threshold)
        results[journal.title] = result.decided(classify.system2_share)
    rows = aggregate(examples, results, classify)
    write_labels(context.out / "labels.jsonl", rows)
    content = report.content(rows, journals, results, calibrations, classify.known)
    text = json.dumps(content, indent=1, ensure_ascii=False)
    (context.out / "report.json").write_text(text, encoding="utf-8")
    report.check_voters(content["voters"], classify, context.progress.say)
    votes = {title: voter["system2_share"] for title, voter in content["voters"].items()}
    agreement = {"agrees_with_known": content["known"]["agreement"]} if "known" in content else {}
    return {**report.counts(rows), "votes_system2": votes, **agreement}


def _journals(model: ModelSection, classify: ClassifySection, context: StageContext) -> list[VoteJournal]:
    """The journal of each voter, in the order of the config.

    Raises ConfigError for voters with one name, and for two addresses whose votes would share a journal.
    """
    journals: dict[str, VoteJournal] = {}
    for number, voter in enumerate(classify.voters):
        identity = context.outside[f"voter:{number}"]
        voter_model = voter.voting_model(model)
        name = voter.name or f"{voter_model.title}/{voter.persona}"
        if name in journals:
            raise ConfigError(f"classify.voters: two voters are named {name}", "give each another name")
        if personas.has_trait(voter.persona, "chat"):
            identity = f"{identity} 2"  # before 2, a vote was read where a thought may have begun
        elif voter.thinking:
            raise ConfigError(
                f"classify.voters: thinking needs a chat persona, and {voter.persona} is not one"
            )
        question = question_of(voter, model.title, classify.show_answer)
        # A model's precision changes its votes. It is known for models that run here, not for remote servers.
        if not voter.base_url:
            identity = f"{identity} {answer_dtype(voter_model, voter.engine)}"
        folder, title = context.journals / "votes", voter_model.title
        journal = VoteJournal(voter, name, title, identity, question, classify.seed, folder)
        for earlier in journals.values():
            if journal.path == earlier.path and voter.base_url != earlier.voter.base_url:
                raise ConfigError(
                    f"classify.voters: {earlier.title} and {name} have one model and persona, but other URLs",
                    "rename one of the models",
                )
        journals[name] = journal
    return list(journals.values())


def _collect_votes(
    journals: list[VoteJournal],
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
    missing = {journal.title: len(journal.missing()) for journal in journals}
    lanes: dict[str, list[VoteJournal]] = {}
    of_model = ("model", "revision", "engine", "vllm")
    for journal in sorted(journals, key=lambda each: [str(getattr(each.voter, name)) for name in of_model]):
        if missing[journal.title]:
            lanes.setdefault(str(journal.voter.base_url or journal.voter.devices or ""), []).append(journal)
        else:
            progress.say(f"{journal.title}: all votes are in its journal")
    stop, begun = threading.Event(), threading.Lock()  # the first lane with an engine takes the lock for good

    def run_lane(lane: list[VoteJournal], engines: EngineCache) -> None:
        for journal in lane:
            # No variable for the engine: it would keep the engine in memory while the next one is loaded.
            voter = journal.voter
            access = voter.base_url, voter.api_key_env, voter.vllm, voter.devices
            spec = EngineSpec(voter.engine, voter.voting_model(model), None, *access)
            votes = journal.ask(engines.get(spec, server, progress.say), progress.say)
            if begun.acquire(blocking=False):
                progress.start("votes", sum(missing.values()))
            # Closed on errors, too, whose traceback would keep the generator, and with it the journal's lock.
            with closing(votes):
                for number, _ in enumerate(votes, 1):
                    failed = f", {len(journal.failures)} failed" if journal.failures else ""
                    progress.advance(1, f"{journal.title} {number}/{missing[journal.title]}{failed}")
                    journal.check(classify.max_failed, PATIENCE)
                    if stop.is_set():
                        return

    def run_separate_lane(lane: list[VoteJournal]) -> None:
        with EngineCache() as engines:
            run_lane(lane, engines)

    main_lane = lanes.pop("", [])
    with in_background([partial(run_separate_lane, lane) for lane in lanes.values()], stop):
        run_lane(main_lane, context.engines)


def _calibrate_voter(journal: VoteJournal, labelled: list[Labelled]) -> Calibration:
    """Calibrate a voter by the labelled examples that are not in its prompt."""
    in_prompt = {row.example.prompt for row in shots_of(journal.voter)}
    unseen = [row for row in labelled if row.example.prompt not in in_prompt]
    method = journal.voter.calibration
    if method == "auto":
        method = "none" if personas.has_trait(journal.voter.persona, "chat") else "held_out"
    of_system = [sum(row.system == system for row in unseen) for system in (1, 2)]
    if method == "held_out" and (len(unseen) < MIN_EXAMPLES or not all(of_system)):
        raise DataError(
            f"{journal.title}: {of_system[0]} System 1 and {of_system[1]} System 2 labelled examples "
            f"outside its prompt, and calibration needs {MIN_EXAMPLES} in all and some of each",
            "more of them in classify.held_out, or calibration: none",
        )
    votes = [journal.vote(row.example) for row in unseen]
    return calibrate(unseen, votes, by_median=method == "held_out")
