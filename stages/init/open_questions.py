"""The questions that rows leave open, for a person to decide; `lorapar init` prints and writes them."""

from __future__ import annotations

from collections.abc import Iterator

from stages.config import BenchmarkSection
from stages.evaluation.benchmarks import benchmarks
from stages.init.config_writer import Protected
from stages.init.data_profile import DataProfile
from stages.runtime import resources


def open_questions(
    profile: DataProfile,
    tests: list[BenchmarkSection],
    labels: str | None = None,
    protected: Protected | None = None,
) -> list[str]:
    """Questions that neither the rows nor a file of labels answer. For the arguments see `choices`."""
    return [
        *_about_rows(profile),
        *_about_success(profile, tests, protected),
        *_about_learning(profile, labels),
    ]


def _about_rows(profile: DataProfile) -> Iterator[str]:
    """Questions about rows that lack something, or have what no stage reads."""
    unverifiable, total = profile.answers["none"], profile.answers.total()
    if profile.unverifiable:
        yield (
            "no row has a verifiable answer (a field gold, --columns gold=COLUMN, or #### and the answer at "
            "its end), so there is no RL. With a reward of your own there can be, or with the weak "
            "text_overlap: rl.rewards, eval.targets: [base, sft, rl] and sft.rounds: 1"
        )
    elif unverifiable:
        instead = (
            "or leave them out" if profile.unanswered else "leave them out, or keep the reward text_overlap"
        )
        yield (
            f"{unverifiable} of {total} rows have no verifiable answer, and RL's reward of correctness needs "
            f"one on each System 2 row: give them a field gold, {instead}"
        )
    if profile.refuses_system:
        yield (
            "how the model is told to end in `#### answer`: its chat template takes no system message, and "
            "SFT alone teaches it"
        )
    if not profile.imitable:
        yield (
            "what is imitated: no row has a response, so RL alone trains. It learns only from what the base "
            "gets right now and then; a few rows with a response allow scores and SFT, too"
        )
    elif profile.unanswered:
        yield (
            f"what is imitated: {profile.unanswered} of {total} rows have no response, so they are voted on "
            "and rewarded, and score and SFT leave them out; both need some rows of each system with one"
        )
    if profile.system2_rows == 0:
        yield "what System 2 learns from: no row is labelled System 2"
    if profile.system2_rows == len(profile.rows.examples):
        yield "what SFT trains on, and the importance of System 1: no row is labelled System 1"
    if profile.ignores_system:
        yield (
            f"what becomes of the field system of {profile.ignores_system} rows: it is kept beside them and "
            "no model is told it; rows of format messages have a system message of their own"
        )


def _about_success(
    profile: DataProfile, tests: list[BenchmarkSection], protected: Protected | None
) -> Iterator[str]:
    """Questions about what is measured, and what is kept."""
    trained = {example.conversation for example in profile.rows.examples}
    for test in tests:
        items = [item.conversation in trained for item in benchmarks.pick(test.kind).load(test)]
        if any(items):
            counts = f"{sum(items)} of its {len(items)}"
            yield f"what {test.path} measures: {counts} questions are trained on"
    if not tests:
        held_out = "no answer can be graded, so no row is held out" if profile.unverifiable else ""
        yield f"which rows measure success: {held_out or 'lorapar init … --test FILE'}"
    if protected:
        yield (
            "how much is kept: partition.protect_theta 0.9 protects about 40 % of the elements, 0.5 about "
            "7 %; with partition.strategy: all both stages train all the others"
        )
    if protected and not protected.test:
        yield (
            f"what {protected.path} loses: no answer in it can be verified, so the report shows how far its "
            "answers drift (KL), and no accuracy"
        )


def _about_learning(profile: DataProfile, labels: str | None) -> Iterator[str]:
    """Questions about who labels the rows, and how training goes."""
    if profile.system2_rows is None and labels is None:
        mib = resources.total_memory()
        billions = 0.8 * mib * 2**20 / 2 / 1e9  # in 16 bits, with a fifth of the memory to spare
        yield (
            "who votes: the model itself is cheap and may be weak: three voters of 135 million parameters "
            "were right on 74 % of questions, and on 36 % where length told nothing. A larger one is better, "
            f"classify.voters: [{{model: NAME}}]; the {mib / 1024:.0f} GiB here hold one of {billions:.0f} "
            "billion parameters. Or bring labels: --labels FILE"
        )
    if profile.thinks and profile.imitable and not profile.thoughts:
        yield (
            "how the model thinks: no row has a thought (reasoning_content, or <think>…</think> in the "
            "response), so what SFT learns of System 2 rows is not to think; leave sft.system2_share at 0"
        )
    elif profile.imitable and not profile.unverifiable and not profile.is_small:
        yield (
            "how RL finds something to reward: after SFT on System 1 alone a small model has hardly a right "
            "answer to System 2, and RL without a signal ends by itself; sft.system2_share: 0.3 is a cold "
            "start"
        )
    yield "learning rates, passes over the rows and LoRA's rank: these are a start"
