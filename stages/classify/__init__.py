"""Label every example as System 1 or System 2 by vote.

Each variant labels other rows: `train` those that are trained on, and others a benchmark's.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, cast

from stages.config import UNVOTED, Config
from stages.pipeline.stage import BENCHMARKS, TRAIN, Check, Planned, Stage

if TYPE_CHECKING:
    from stages.pipeline.steps import Step
    from stages.plan.texts import Texts
    from stages.plan.tokens import Span, Work


def _steps(config: Config) -> list[Planned]:
    labelled = [name for name, benchmark in config.eval.benchmarks.items() if benchmark.label]
    return [_step(config, rows) for rows in (*([TRAIN] if config.data.path else []), *labelled)]


def _step(config: Config, rows: str) -> Planned:
    classify, reads, settings = config.classify, [f"rows:{rows}"], ["model.title"]
    if rows != TRAIN and config.eval.benchmarks[rows].brings_labels:
        settings = ["classify.known", f"{BENCHMARKS}{rows}.label"]
    elif classify.strategy not in UNVOTED:
        for number, voter in enumerate(classify.voters):
            reads += [f"voter:{number}"]
            reads += [f"rows:classify.voters.{number}.shots_path"] if voter.shots_path else []
        reads += ["rows:classify.held_out"] if classify.held_out else []
    else:
        reads += ["file:classify.labels_file"] if classify.labels_file else []
        settings = []
    return Planned(
        variant=rows,
        sections=("data" if rows == TRAIN else f"{BENCHMARKS}{rows}", "classify", "server"),
        settings=tuple(settings),
        reads=tuple(reads),
        memory_hint="server.batch_size, or choose a smaller model",
    )


def _checks(texts: Texts, step: Step) -> Iterator[Check]:
    from stages.labelling.known import known_labels

    config, rows = texts.config, step.variant
    strategy = config.labelling_strategy(rows)
    if strategy == "known":
        yield lambda: known_labels(texts.rows[rows], config.classify, config.eval.benchmarks.get(rows))
    elif strategy not in UNVOTED:
        yield from _server_checks(texts)
    yield partial(texts.check_prompts, step)


def _server_checks(texts: Texts) -> Iterator[Check]:
    """A connection to each server that must be asked, because no run has votes of its model."""
    from stages.engines.openai import check_reachable
    from stages.labelling.votes import journal_path

    config, votes = texts.config, texts.store.root.parent / "votes"
    for voter in config.classify.voters:
        pattern = journal_path(votes, voter.voting_model(config.model).title, voter.persona, "*").name
        if voter.base_url and not any(votes.glob(pattern)):  # else the votes may all be there
            yield partial(check_reachable, voter.base_url)


def _spans(texts: Texts, variant: str) -> Iterator[Span]:
    from stages.engines.openai import max_reply_tokens
    from stages.labelling.personas import read_labelled_examples
    from stages.labelling.votes import tolerated
    from stages.plan.tokens import Lengths, Span

    classify, number = texts.config.classify, len(texts.rows[variant])
    if texts.config.labelling_strategy(variant) in UNVOTED or not number:
        return
    for voter, ballots in zip(classify.voters, texts.ballots(variant), strict=True):
        if ballots:
            served = voter.engine != "transformers"
            reply = max(max_reply_tokens(b) if served else b.max_thinking_tokens for b in ballots)
            lengths = Lengths(len(ballot.text) for ballot in ballots)
            limit = texts.limit(voter.engine, reply, voter.vllm)
            asked = (number + len(read_labelled_examples(classify.held_out))) * voter.samples
            allowed = tolerated(asked, classify.max_failed) / voter.samples
            yield Span(f"vote on {variant}, {voter.persona}", number, lengths, *limit, "fail", allowed)


def _work(texts: Texts, variant: str) -> Work | None:
    """Votes, one forward pass over each prompt, and the first time those on held-out examples."""
    from stages.labelling.personas import read_labelled_examples
    from stages.plan.texts import PROMPT_SAMPLE
    from stages.plan.tokens import Work, per_text

    config, rows, voters = texts.config, texts.rows[variant], texts.config.classify.voters
    if config.labelling_strategy(variant) in UNVOTED or not rows:
        return Work(copies=0)
    if config.model.load_in_4bit or any(v.model or v.base_url or v.thinking for v in voters):
        return None  # other models vote (the base itself in 16 bits), or think at unknown length
    first = variant == TRAIN
    examples = len(rows) + (len(read_labelled_examples(config.classify.held_out)) if first else 0)
    ballots = (requests[:PROMPT_SAMPLE] for requests in texts.ballots(variant))
    prompts = [[cast("list[int]", request.text) for request in requests] for requests in ballots]
    tokens = sum(v.samples * per_text(p, len(p)) for v, p in zip(voters, prompts, strict=True))
    served = any(voter.engine != "transformers" for voter in voters)
    return Work(read=examples * tokens, servers=served and first)


STAGE = Stage(
    name="classify",
    steps=_steps,
    variants_help="train or a benchmark",
    unkeyed_sections=("model",),
    files={
        "labels.jsonl": "One object per row, in their order: `id`, `prompt`, `response`, `gold`, "
        "`extra` (other fields of the row), `system` (1, 2, or null if undecided) and `votes` (voter → "
        "probability of System 2).",
        "report.json": "Votes of each voter, its invalid and failed answers, its AUC on known examples, and "
        "the comparison with known labels. Only where voters label.",
    },
    checks=_checks,
    spans=_spans,
    work=_work,
    version=8,
)
