"""The config that `lorapar init` writes: settings that follow from the profile of the rows, with reasons, and
the questions that the rows leave open, for a person to decide."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, count
from typing import Any

from stages import escaping
from stages.config import AUTO, TRAINED, BenchmarkSection, LoraSection, RlSection, ServerSection
from stages.config.sources import ALL_LINEAR
from stages.config.yaml import on_one_line
from stages.data.files import stem
from stages.evaluation.benchmarks import benchmarks
from stages.init.data_profile import FEWEST_WORKED, VERIFIED, DataProfile, question
from stages.plan.tokens import Lengths

FAR = 2
"""The longest row sets a limit, unless it is more than this many times as long as 99 % of the rows."""
ROOM = 1.25
"""Completions may be longer than the references by this factor."""
VOTE = 512
"""The most tokens of the text that a voter adds to a row."""
ROLE_PLAY = 3e9
"""Parameters from which on a base is asked to play a role, as the paper's voters are."""
STEP = 16
"""Lengths are rounded up to multiples of this."""
BARE = 0.8
"""Where more of the rows have an answer without its working, the others say little of its length."""
THOUGHT = 1024
"""Tokens of a thought and its answer, where the rows do not show any."""
THINKING = 0.8
"""Share of a completion that its thought may take."""
MIN_RL_STEPS = 4
"""Steps of RL that the System 2 rows (those labelled so, or half of all) should suffice for, at the least."""


@dataclass(frozen=True)
class Choice:
    """A setting by its dotted name, its value, and the reason for it in the rows or the model."""

    name: str
    value: Any
    why: str = ""


SFT_ALONE = [
    Choice("sft.data", "all", "no answer can be verified, so System 2 learns by SFT, too"),
    Choice("eval.targets", ["base", "sft"], "so no RL runs"),
]
RL_ALONE = [
    Choice("partition.strategy", "all", "importance is scored on responses, and no row has one"),
    Choice("rl.start_from", "init", "SFT has nothing to imitate"),
    Choice("eval.targets", ["base", "rl"], "so no SFT runs"),
]


def choices(
    profile: DataProfile, model: str, data: str, tests: list[BenchmarkSection], labels: str | None, name: str
) -> Iterator[Choice]:
    """Yield the settings that differ from the defaults for these rows.

    name: of the run. tests: one benchmark for each test file. labels: file with known labels.
    """
    run = _word(name).lstrip("-") or "default"
    yield from (Choice("run", run), Choice("model.name", model), Choice("data.path", data))
    if empty := profile.rows.empty:
        yield Choice("data.empty", "drop", f"{empty} rows have no prompt or no response")
    if repeated := profile.rows.repeated:
        yield Choice("data.duplicates", "first", f"{repeated} rows repeat one before")
    longest, why = _limit(profile.row, profile.positions)
    yield Choice("data.max_length", longest, f"prompt and response: {why}")
    if longest < profile.row.longest:
        yield Choice("data.too_long", "drop", "the longer rows are left out of SFT and score")
    yield from _prompt(profile)
    if missing := sorted(set(LoraSection().target_modules) - profile.linear):
        why = f"{', '.join(sorted(profile.linear))}: the model has no {', '.join(missing)}"
        yield Choice("lora.target_modules", ALL_LINEAR, why)
    yield from _labels(profile, labels)
    rl = list(_rl(profile))
    limits = {choice.name: choice.value for choice in rl}
    yield from [] if profile.imitable else RL_ALONE
    if profile.unverifiable:
        yield from [] if profile.modes else SFT_ALONE
    else:
        yield from rl
    yield from _small(profile) if profile.is_small else ()
    answer = limits["rl.max_prompt_length"] + limits["rl.max_completion_length"]
    if (needed := max(answer, profile.row.longest) + VOTE) > ServerSection().max_model_len:
        why = "the longest row, or prompt with its answer, and a voter's text"
        yield Choice("server.max_model_len", min(needed, profile.positions or needed), why)
    yield from _benchmarks(tests, limits)


def _prompt(profile: DataProfile) -> Iterator[Choice]:
    """Template and messages: modes by the template's switch or, to verify answers, by messages."""
    section = profile.section
    if section.template == "plain":
        yield Choice("prompt.template", "plain", "the tokenizer has no chat template")
    if section.system:
        yield Choice("prompt.system", section.system, "so that answers can be verified")
    if profile.modes:
        evidence = (
            f"{profile.thoughts} have a thought" if profile.thinks else f"{profile.worked} show working"
        )
        taught = {
            "fast": "System 1 rows, by their answer alone",
            "slow": f"rows of both systems that are worked: of {len(profile.rows.examples)}, {evidence}",
            "auto": "System 1 rows by their answer, System 2 rows worked: it learns when to do which",
        }
        for mode, why in taught.items():
            of_mode = getattr(profile.modes, mode).model_dump(exclude_defaults=True)
            yield Choice(f"modes.{mode}", of_mode, why)
        *earlier, last = TRAINED[:1] if profile.unverifiable else TRAINED
        targets = ["base", *(f"{name}:{AUTO}" for name in earlier), *(f"{last}:{mode}" for mode in taught)]
        yield Choice("eval.targets", targets, "each mode after the last training")


def _labels(profile: DataProfile, labels: str | None) -> Iterator[Choice]:
    """Known labels, or few-shot voters for a base that cannot chat or is too small to play a role."""
    if labels:
        yield Choice("classify.strategy", "known", "no model votes")
        yield Choice("classify.labels_file", labels)
    elif profile.system2_rows is not None:
        yield Choice("classify.strategy", "known", "each row has a field system")
    elif profile.section.template == "plain" or (profile.parameters or ROLE_PLAY) < ROLE_PLAY:
        why = "the model itself, by worked examples: it has no chat, or is small for playing a role"
        yield Choice("classify.voters", [{"persona": "steps"}, {"persona": "effort"}], why)


def _small(profile: DataProfile) -> Iterator[Choice]:
    """Rates of a small model, and a cold start; the defaults are the paper's, for 7 billion parameters."""
    if profile.imitable:
        yield Choice("sft.learning_rate", 2e-3, "a small model learns slowly: the demo's rate")
    if profile.imitable and not profile.unverifiable and not profile.modes:
        why = "else a small model has hardly a right answer to System 2, and RL no signal"
        yield Choice("sft.system2_share", 0.3, why)
    if not profile.unverifiable:
        yield Choice("rl.learning_rate", 1.5e-4, "half of the demo's, for longer training")


def open_questions(profile: DataProfile, tests: list[BenchmarkSection], labels: str | None) -> list[str]:
    """Questions that neither the rows nor a file of labels answer."""
    total, without_answer = len(profile.rows.examples), profile.answers["none"]
    verifiable, imitable, labelled = not profile.unverifiable, profile.imitable, profile.system2_rows
    thoughtless = profile.thinks and imitable and not profile.thoughts
    needs_cold_start = imitable and verifiable and not profile.modes and not profile.is_small
    questions = {
        "no row has a verifiable answer (a field gold, --columns gold=COLUMN, or #### and the answer at its "
        "end), so no row is held out, and there is no RL without a reward of your own": not verifiable,
        f"{without_answer} of {total} rows have no verifiable answer, and RL's reward of correctness needs "
        "one on each System 2 row: a field gold, or leave them out": verifiable and without_answer > 0,
        "how the model is told to end in `#### answer`: its chat template takes no system message, and SFT "
        "alone teaches it": profile.answers.keys() <= VERIFIED
        and not (profile.section.system or profile.modes),
        "what is imitated: no row has a response, so RL alone trains, by what the base gets right now and "
        "then; a few rows with a response allow scores and SFT, too": not imitable,
        "what System 2 learns from: no row is labelled System 2": labelled == 0,
        "what SFT trains on, and System 1's importance: no row is labelled System 1": labelled == total,
        "which rows measure success: lorapar init … --test FILE": verifiable and not tests,
        "who votes: the model itself is cheap and may be weak, a larger one is better (classify.voters: "
        "[{model: NAME}]). Or bring labels: --labels FILE": labelled is None and labels is None,
        "how the model thinks: no row has a thought (reasoning_content, or <think>…</think> in the "
        "response), so RL alone teaches the slow mode": thoughtless,
        "what a slow mode learns from, so there are no modes: fewer than "
        f"{FEWEST_WORKED} rows show how their answer is worked out (a column that does: --columns "
        "solution=COLUMN)": imitable and verifiable and not profile.modes,
        "how RL finds something to reward: after SFT on System 1 alone a small model has hardly a right "
        "answer to System 2; sft.system2_share: 0.3 is a cold start": needs_cold_start,
        "learning rates, passes over the rows and LoRA's rank: these are a start": True,
    }
    trained = {question(example) for example in profile.rows.examples}
    for test in tests:
        items = [question(item) in trained for item in benchmarks.pick(test.kind).load(test)]
        counts = f"{sum(items)} of its {len(items)} questions are trained on"
        questions[f"what {test.path} measures: {counts}"] = any(items)
    return [text for text, is_open in questions.items() if is_open]


def document(chosen: list[Choice], head: list[str], undecided: list[str]) -> str:
    """The choices as YAML, each with its reason as a comment, between other comments."""
    tree: dict[str, Any] = {}
    for choice in chosen:
        *path, last = choice.name.split(".")
        section = tree
        for key in path:
            section = section.setdefault(key, {})
        section[last] = choice
    questions = ["", "# Undecided:", *(f"# - {escaping.one_line(line)}" for line in undecided)]
    return "\n".join([*(f"# {escaping.one_line(line)}" for line in head), *_lines(tree), *questions, ""])


def _lines(tree: dict[str, Any], indent: str = "") -> Iterator[str]:
    for name, node in tree.items():
        if isinstance(node, Choice):
            why = f" # {escaping.one_line(node.why)}" if node.why else ""
            yield f"{indent}{on_one_line(name)}: {on_one_line(node.value)}{why}"
        else:
            yield f"{indent}{on_one_line(name)}:"
            yield from _lines(node, indent + "  ")


def _limit(lengths: Lengths, positions: int | None) -> tuple[int, str]:
    """The longest length to allow, and why. positions: tokens that the model can read."""
    if lengths.longest <= FAR * lengths.p99:
        limit, why = lengths.longest, f"the longest has {lengths.longest} tokens"
    else:
        limit = lengths.p99
        why = f"99 % have at most {limit} tokens, the longest {lengths.longest}"
    rounded = -(-limit // STEP) * STEP  # up
    if positions is not None and rounded > positions:
        return positions, f"{why}, and the model reads {positions}"
    return rounded, why


def _rl(profile: DataProfile) -> Iterator[Choice]:
    defaults, number = RlSection(), len(profile.rows.examples)
    prompt, prompt_why = _limit(profile.prompt, profile.positions)
    response, response_why = _limit(profile.response, profile.positions)
    shows_thoughts = profile.thoughts or not profile.thinks
    shows_working = profile.imitable and profile.worked >= (1 - BARE) * number
    guess = THOUGHT if not shows_thoughts else 0 if shows_working else defaults.max_completion_length
    if response < guess:
        response, lacking = guess, "thoughts" if not shows_thoughts else "working"
        response_why = f"rows show no {lacking}, so {guess} is a guess"
    completion = -(-round(response * ROOM) // STEP) * STEP
    if profile.positions is not None and prompt + completion > profile.positions:
        completion = max(profile.positions - prompt, profile.positions // 4)
        prompt = profile.positions - completion
        response_why = f"{response_why}, and with its prompt the model reads {profile.positions}"
    system2 = number // 2 if profile.system2_rows is None else profile.system2_rows
    if (largest := system2 // MIN_RL_STEPS) < defaults.prompts_per_step:
        # `-` binds before `<<`: the largest power of two that is not above `largest`, and at least 1.
        power_of_two = 1 << max(largest, 1).bit_length() - 1
        yield Choice(
            "rl.prompts_per_step", power_of_two, f"for {MIN_RL_STEPS} steps on {system2} System 2 rows"
        )
    elif profile.modes and profile.system2_rows != number:
        yield Choice("rl.system1_share", 0.375, "so that fast and auto are practised, too: the demo's")
    yield Choice("rl.max_prompt_length", prompt, prompt_why)
    yield Choice("rl.max_completion_length", completion, f"responses, with a quarter more: {response_why}")
    if profile.thinks:
        why = "then the thought is closed, and an answer follows"
        yield Choice("rl.max_thinking_length", round(completion * THINKING), why)
    yield Choice("rl.rewards", *_reward(profile))


def _reward(profile: DataProfile) -> tuple[dict[str, float], str]:
    answers = profile.answers
    if answers.keys() == {"tests"}:
        return {"code_tests": 1.0}, "each row has a test and its entry_point; they run in the sandbox"
    lacking = answers["none"] + answers["tests"]
    # The overlap of words needs a response.
    if lacking and not (profile.unanswered and answers.keys() & VERIFIED):
        return {"text_overlap": 1.0}, f"{lacking} of {answers.total()} rows have no answer to compare with"
    return {"correctness": 1.0}, f"rows have an answer, mostly a {answers.most_common(1)[0][0]}"


def _benchmarks(tests: list[BenchmarkSection], limits: dict[str, Any]) -> Iterator[Choice]:
    """A benchmark for each test file, by its name or, where that says nothing, by the kind of benchmark.

    limits: the settings of RL; answers and thoughts may be as long.
    """
    names: list[str] = []
    thinking = limits.get("rl.max_thinking_length", 0)
    for test in tests:
        word = _word(str(test.path)).strip("-_")
        numbered = (f"{test.kind}-{number}" for number in count(1))
        candidates = chain([test.kind if word in ("", "train") else word], numbered)
        names.append(next(name for name in candidates if name not in names))
        section, defaults = f"eval.benchmarks.{names[-1]}", benchmarks.pick(test.kind).DEFAULTS
        yield Choice(f"{section}.kind", test.kind, "which can read its rows")
        yield Choice(f"{section}.path", str(test.path))
        if "split" in test.model_fields_set:
            yield Choice(f"{section}.split", test.split, "not the rows that are trained")
        if test.duplicates == "first":
            yield Choice(f"{section}.empty", "drop", "as of the rows that are trained")
            yield Choice(f"{section}.duplicates", "first")
        if defaults.get("shots"):
            yield Choice(f"{section}.shots", 0, "no rows for worked examples are named")
        # A published benchmark's default fits these rows, too; others have one for their own rows, if any.
        if "max_new_tokens" not in defaults or "revision" not in defaults:
            length = limits["rl.max_completion_length"] - thinking
            yield Choice(f"{section}.max_new_tokens", length, "as many as in RL")
            if thinking:
                yield Choice(f"{section}.max_thinking_tokens", thinking, "then it is closed, as in RL")


def _word(path: str) -> str:
    """The name of a file, in characters that are allowed in names of runs and benchmarks."""
    return "".join(c if c.isalnum() or c in "-_" else "-" for c in stem(path))
