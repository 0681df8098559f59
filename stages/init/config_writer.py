"""The config that `lorapar init` writes: the settings that follow from a survey, each with its reason."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from stages.config import BenchmarkSection, Config, LoraSection, ServerSection
from stages.config.sources import ALL_LINEAR
from stages.evaluation.benchmarks import benchmarks
from stages.init.data_profile import Survey
from stages.plan.lengths import Lengths

FAR = 2
"""The longest row sets a length, unless it is this many times as long as 99 % of the rows."""
ROOM = 1.25
"""Completions may be longer than the references by this factor."""
VOTE = 512
"""Tokens of a voter's own text, or fewer."""
STEP = 16
"""Lengths are rounded up to multiples of this."""
GROUPS = 4
"""Steps of RL that the System 2 rows, those labelled so or half of all, should give at least."""


@dataclass(frozen=True)
class Choice:
    """A setting by its dotted name, its value, and what in the rows or in the model it follows from."""

    name: str
    value: Any
    why: str = ""


def choices(found: Survey, model: str, data: str, tests: list[BenchmarkSection]) -> list[Choice]:
    """All settings that differ from the defaults for these rows.

    tests: the files of test rows, each with the benchmark that reads it.
    """
    run = _word(data).lstrip("-") or "default"
    chosen = [Choice("run", run), Choice("model.name", model), Choice("data.path", data)]
    if found.rows.empty:
        chosen.append(Choice("data.empty", "drop", f"{found.rows.empty} rows have no prompt or no response"))
    if found.rows.repeated:
        chosen.append(Choice("data.duplicates", "first", f"{found.rows.repeated} rows repeat one before"))
    chosen += _lengths(found)
    if found.section.template == "plain":
        chosen.append(Choice("prompt.template", "plain", "the tokenizer has no chat template"))
        if found.slow is None:
            why = "a voter without a chat; see: lorapar list personas"
            chosen.append(Choice("classify.voters", [{"persona": "steps"}], why))
    if found.section.system:
        chosen.append(Choice("prompt.system", found.section.system, "so that answers can be verified"))
    if missing := sorted(set(LoraSection().target_modules) - found.linear):
        why = f"{', '.join(sorted(found.linear))}: the model has no {', '.join(missing)}"
        chosen.append(Choice("lora.target_modules", ALL_LINEAR, why))
    if found.slow is not None:
        chosen.append(Choice("classify.strategy", "known", "each row has a field system"))
    rl = _rl(found)
    limits = {choice.name: choice.value for choice in rl}
    return [*chosen, *rl, *_server(found, limits), *_eval(tests, limits["rl.max_completion_length"])]


def undecided(found: Survey, tests: list[BenchmarkSection]) -> list[str]:
    """What the rows do not say, and who has to decide it."""
    open_ = []
    some, number = found.answers["none"], found.answers.total()
    if 0 < some < number:
        open_.append(
            f"{some} of {number} rows have no verifiable answer, and RL's reward of correctness needs one on "
            "each: give them a field gold, leave them out, or keep the reward text_overlap"
        )
    elif some:
        open_.append(
            "no row has a verifiable answer: RL rewards the overlap of words with the response, which is weak"
        )
    if found.refuses_system:
        open_.append(
            "how the model is told to end in `#### answer`: its chat template takes no system message, and "
            "SFT alone teaches it"
        )
    if found.slow == 0:
        open_.append("what RL trains on: no row is labelled System 2")
    if found.slow == len(found.rows.examples):
        open_.append("what SFT trains on, and the importance of System 1: no row is labelled System 1")
    if found.ignores_system:
        open_.append(
            f"what becomes of the field system of {found.ignores_system} rows: it is kept beside them and no "
            "model is told it; rows of format messages have a system message of their own"
        )
    if not tests:
        open_.append("which rows measure success: lorapar init … --test FILE")
    if found.slow is None:
        open_.append(
            "who votes: one voter, the model itself, is the default; more and larger ones agree better "
            "(lorapar list personas; classify.voters, classify.system2_share)"
        )
    open_.append(
        "how RL finds something to reward: after SFT on System 1 alone a small model has hardly a right "
        "answer to System 2, and RL without a signal ends by itself; sft.system2_share: 0.3 is a cold start"
    )
    open_.append("learning rates, passes over the rows and LoRA's rank: the defaults are a start")
    return open_


def document(chosen: list[Choice], head: list[str], foot: list[str]) -> str:
    """The choices as YAML, each with its reason as a comment, between other comments."""
    tree: dict[str, Any] = {}
    for choice in chosen:
        *path, last = choice.name.split(".")
        at = tree
        for part in path:
            at = at.setdefault(part, {})
        at[last] = choice
    comments = ["", "# Undecided:", *(f"# - {line}" for line in foot)] if foot else []
    return "\n".join([*(f"# {line}" for line in head), *_lines(tree), *comments, ""])


def _lines(tree: dict[str, Any], indent: str = "") -> Iterator[str]:
    for name, part in tree.items():
        if isinstance(part, Choice):
            value = _plain(part.value)
            yield f"{indent}{_plain(name)}: {value}" + (f" # {part.why}" if part.why else "")
        else:
            yield f"{indent}{_plain(name)}:"
            yield from _lines(part, indent + "  ")


def _plain(value: Any) -> str:
    """A value, or a name that would be read as another kind of value, as YAML on one line."""
    text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10**6)
    return text.removesuffix("...\n").strip()


def _lengths(found: Survey) -> list[Choice]:
    longest, why = _limit(found.row, found.positions)
    chosen = [Choice("data.max_length", longest, f"prompt and response: {why}")]
    if longest < found.row.longest:
        chosen.append(Choice("data.too_long", "drop", "the longer rows are left out of SFT and score"))
    return chosen


def _limit(lengths: Lengths, most: int | None) -> tuple[int, str]:
    """The longest length to allow, and why."""
    if lengths.longest <= FAR * lengths.p99:
        wanted, why = lengths.longest, f"the longest has {lengths.longest} tokens"
    else:
        wanted = lengths.p99
        why = f"99 % have at most {wanted} tokens, the longest {lengths.longest}"
    rounded = -(-wanted // STEP) * STEP
    if most is not None and rounded > most:
        return most, f"{why}, and the model reads {most}"
    return rounded, why


def _rl(found: Survey) -> list[Choice]:
    defaults = Config.model_fields["rl"].default
    prompt, why = _limit(found.prompt, found.positions)
    response, of_response = _limit(found.response, found.positions)
    completion = -(-round(response * ROOM) // STEP) * STEP
    if found.positions is not None and prompt + completion > found.positions:
        completion = max(found.positions - prompt, found.positions // 4)
        prompt = found.positions - completion
        of_response = f"{of_response}, and with its prompt the model reads {found.positions}"
    chosen = []
    slow, there = found.slow, f"{found.slow} System 2 rows"
    if slow is None:
        rows = len(found.rows.examples)
        slow, there = rows // 2, f"{rows} rows"
    fewest = slow // GROUPS
    if fewest < defaults.prompts_per_step:
        number = 1 << max(fewest, 1).bit_length() - 1
        chosen.append(Choice("rl.prompts_per_step", number, f"there are {there}"))
    chosen += [
        Choice("rl.max_prompt_length", prompt, why),
        Choice("rl.max_completion_length", completion, f"responses, with a quarter more: {of_response}"),
        Choice("rl.rewards", *_reward(found)),
    ]
    return chosen


def _server(found: Survey, limits: dict[str, Any]) -> list[Choice]:
    """Room for the longest votes and answers, where a server that lorapar starts would have less."""
    most = max(limits["rl.max_prompt_length"] + limits["rl.max_completion_length"], found.row.longest) + VOTE
    if most <= ServerSection().max_model_len:
        return []
    room = min(most, found.positions or most)
    return [
        Choice("server.max_model_len", room, "the longest row, or prompt with its answer, and a voter's text")
    ]


def _reward(found: Survey) -> tuple[dict[str, float], str]:
    kinds = set(found.answers)
    if kinds == {"tests"}:
        return {"code_tests": 1.0}, "each row has a test and its entry_point; they run in the sandbox"
    if "none" in kinds or "tests" in kinds:
        lacking = found.answers["none"] + found.answers["tests"]
        return {
            "text_overlap": 1.0
        }, f"{lacking} of {found.answers.total()} rows have no answer to compare with"
    most = found.answers.most_common(1)[0][0]
    return {"correctness": 1.0}, f"each row has an answer, mostly a {most}"


def _eval(tests: list[BenchmarkSection], longest: int) -> list[Choice]:
    chosen: list[Choice] = []
    names: set[str] = set()
    for test in tests:
        kind, path = test.kind, str(test.path)
        word = _word(path).strip("-_")
        tried = [word if word not in ("", "train") else kind]
        tried += [f"{kind}-{number}" for number in range(1, len(tests) + 2)]
        names.add(unique := next(name for name in tried if name not in names))
        name = f"eval.benchmarks.{unique}"
        chosen += [Choice(f"{name}.kind", kind, "which can read its rows"), Choice(f"{name}.path", path)]
        if test.duplicates == "first":
            chosen.append(Choice(f"{name}.empty", "drop", "some rows are empty or repeat one before"))
            chosen.append(Choice(f"{name}.duplicates", "first"))
        defaults = benchmarks.pick(kind).DEFAULTS
        if defaults.get("shots"):
            chosen.append(Choice(f"{name}.shots", 0, "no rows for worked examples are named"))
        if "max_new_tokens" not in defaults or "revision" not in defaults:  # of its own rows, not of these
            chosen.append(Choice(f"{name}.max_new_tokens", longest, "as many as in RL"))
    return chosen


def _word(path: str) -> str:
    """The name of a file, in the characters that names of runs and benchmarks have."""
    return "".join(c if c.isalnum() or c in "-_" else "-" for c in Path(path).name.split(".")[0])
