"""The questions that rows leave open, for a person to decide; `lorapar init` prints and writes them."""

from __future__ import annotations

from stages.config import BenchmarkSection
from stages.evaluation.benchmarks import benchmarks
from stages.init.data_profile import DataProfile


def open_questions(profile: DataProfile, tests: list[BenchmarkSection], labels: str | None) -> list[str]:
    """Questions that neither the rows nor a file of labels answer. For the arguments see `choices`."""
    total, without_answer = len(profile.rows.examples), profile.answers["none"]
    verifiable, imitable, labelled = not profile.unverifiable, profile.imitable, profile.system2_rows
    thoughtless = profile.thinks and imitable and not profile.thoughts
    needs_cold_start = imitable and verifiable and not thoughtless and not profile.is_small
    questions = {
        "no row has a verifiable answer (a field gold, --columns gold=COLUMN, or #### and the answer at its "
        "end), so no row is held out, and there is no RL without a reward of your own": not verifiable,
        f"{without_answer} of {total} rows have no verifiable answer, and RL's reward of correctness needs "
        "one on each System 2 row: a field gold, or leave them out": verifiable and without_answer > 0,
        "how the model is told to end in `#### answer`: its chat template takes no system message, and SFT "
        "alone teaches it": profile.refuses_system,
        "what is imitated: no row has a response, so RL alone trains, by what the base gets right now and "
        "then; a few rows with a response allow scores and SFT, too": not imitable,
        f"what is imitated: {profile.unanswered} of {total} rows have no response; score and SFT leave them "
        "out, and need some rows of each system with one": imitable and profile.unanswered > 0,
        "what System 2 learns from: no row is labelled System 2": labelled == 0,
        "what SFT trains on, and System 1's importance: no row is labelled System 1": labelled == total,
        f"what becomes of the field system of {profile.ignores_system} rows: no model is told it; rows of "
        "format messages have a system message of their own": profile.ignores_system > 0,
        "which rows measure success: lorapar init … --test FILE": verifiable and not tests,
        "who votes: the model itself is cheap and may be weak, a larger one is better (classify.voters: "
        "[{model: NAME}]). Or bring labels: --labels FILE": labelled is None and labels is None,
        "how the model thinks: no row has a thought (reasoning_content, or <think>…</think> in the "
        "response), so SFT on System 2 rows would teach it not to; leave sft.system2_share at 0": thoughtless,
        "how RL finds something to reward: after SFT on System 1 alone a small model has hardly a right "
        "answer to System 2; sft.system2_share: 0.3 is a cold start": needs_cold_start,
        "learning rates, passes over the rows and LoRA's rank: these are a start": True,
    }
    trained = {example.conversation for example in profile.rows.examples}
    for test in tests:
        items = [item.conversation in trained for item in benchmarks.pick(test.kind).load(test)]
        counts = f"{sum(items)} of its {len(items)} questions are trained on"
        questions[f"what {test.path} measures: {counts}"] = any(items)
    return [question for question, is_open in questions.items() if is_open]
