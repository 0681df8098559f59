"""classify: every voter votes each example System 1 or 2; the votes become labels.

Votes are journalled per voter outside of the artifact, under `votes/`, and an answer in a journal is never asked for again:
another voter asks only for its own, and a killed run goes on where it was.
"""

from __future__ import annotations

import logging
import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages import sources
from stages.artifacts import key_of
from stages.benchmarks import benchmarks
from stages.config import BenchmarkSection, ClassifySection, DataSection, ModelSection, ServerSection, Voter
from stages.engines import Pool, Served
from stages.errors import ConfigError
from stages.language.voting import Target, decide, personas, twos
from stages.records import Example, Journal, Labelled, write_labels

if TYPE_CHECKING:
    from stages.pipeline import Progress

log = logging.getLogger(__name__)


def run(
    model: ModelSection,
    classify: ClassifySection,
    votes_dir: Path,
    voter_identities: list[str],
    engines: Pool,
    out: Path,
    progress: Progress,
    server: ServerSection,
    data: DataSection | None = None,
    benchmark: BenchmarkSection | None = None,
) -> dict[str, Any]:
    """Write `labels.jsonl`: every example of `data` (or of `benchmark`) with its label and votes; returns the counts.

    voter_identities: per voter the digest or name of its model, so that other weights get another journal.
    """
    examples = benchmarks.pick(benchmark.kind).load(benchmark) if benchmark else sources.read(data or DataSection())
    target = Target(sources.model_title(model), classify.show_answer)
    if classify.strategy == "random":
        rng = random.Random(classify.seed)
        rows = [Labelled(e, 2 if rng.random() < (classify.system2_share or 0.5) else 1, {}) for e in examples]
    else:
        votes = {}
        # Voters of one model follow each other, so that its server starts once.
        for voter, known in sorted(zip(classify.voters, voter_identities, strict=True), key=lambda pair: pair[1]):
            title = _title(voter, model)
            if title in votes:
                raise ConfigError(f"classify.voters: two voters are {title}", "give each its own persona or model")
            votes[title] = _ask(voter, known, examples, target, model, server, votes_dir, engines, progress)
        rows = decide(examples, votes, classify.system2_share, classify.min_agreement)
    write_labels(out / "labels.jsonl", rows)
    return _counts(rows, classify.system2_share)


def _title(voter: Voter, model: ModelSection) -> str:
    return f"{sources.model_title(ModelSection(name=voter.model) if voter.model else model)}/{voter.persona}"


def _ask(
    voter: Voter,
    known: str,
    examples: list[Example],
    target: Target,
    model: ModelSection,
    server: ServerSection,
    votes_dir: Path,
    engines: Pool,
    progress: Progress,
) -> dict[str, float]:
    """The probability of System 2 per example, from the voter's journal and, for what it lacks, from its engine."""
    persona = personas.pick(voter.persona)
    ballots = {e.id: persona(e, target) for e in examples}
    # A ballot's digest, not the example's id alone, is what was answered: another persona text asks anew.
    asked = {e.id: key_of({"text": ballots[e.id].text, "words": ballots[e.id].words}) for e in examples}
    title = _title(voter, model)
    name = f"{title.replace('/', '-')}-{key_of({'voter': known, 'engine': voter.engine})}.jsonl"
    with Journal(votes_dir / name) as journal:
        have = {row["ballot"]: row["system2"] for row in journal.rows}
        missing = [e.id for e in examples if asked[e.id] not in have]
        if missing:
            voter_model = ModelSection(name=voter.model, revision="main") if voter.model else model
            served = Served(voter.engine, voter_model, None, voter.base_url, voter.api_key_env)
            engine = engines.get(served, server, progress.say)
            progress.start(f"{title} votes", len(missing))
            for i, choice in engine.choose([ballots[id] for id in missing]):
                ballot = asked[missing[i]]
                have[ballot] = choice.shares[1]
                journal.append({"ballot": ballot, "example": missing[i], "system2": choice.shares[1], "mass": choice.mass})
                progress.advance(1)
        else:
            progress.say(f"{title}: all {len(examples)} votes are in its journal")
    return {e.id: have[asked[e.id]] for e in examples}


def _counts(rows: list[Labelled], share: float | None) -> dict[str, Any]:
    names = {1: "system1", 2: "system2", None: "undecided"}
    counts = {name: sum(row.system == system for row in rows) for system, name in names.items()}
    with_gold = sum(row.example.gold is not None for row in rows)
    voters = list(rows[0].votes)
    said = {voter: twos({row.example.id: row.votes[voter] for row in rows}, share) for voter in voters}
    agree = [1 - len(said[v] ^ said[w]) / len(rows) for v in voters for w in voters if v < w]
    return {
        "examples": len(rows),
        **counts,
        "with_gold": with_gold,
        "mean_system2": {voter: sum(row.votes[voter] for row in rows) / len(rows) for voter in voters},
        **({"pairwise_agreement": sum(agree) / len(agree)} if agree else {}),
    }
