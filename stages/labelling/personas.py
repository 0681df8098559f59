"""What voters are asked. A persona turns an example into a Ballot: a prompt and the two words between which the voter chooses.

`role_play` is the paper's and is for strong models; the few-shot ones are for small models, for which the label words decide
more than anything else.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from stages.engines import Ballot
from stages.errors import DataError
from stages.records import Example, problems, read_jsonl
from stages.registry import Registry

personas: Registry = Registry("persona")
"""Traits. `chat`: for strong models, and with a threshold of 0.5; the others need calibration. `few-shot`: shows worked examples."""

HERE = Path(__file__).parent
SHOTS = HERE / "shots.jsonl"
"""Worked examples: recall, reading, one step and yes/no questions of System 1; terse and wordy chains and yes/no questions of
System 2. None is in the demonstration set, and none in HELD_OUT."""
HELD_OUT = HERE / "held_out.jsonl"
"""Labelled examples for calibration, 16 of each system, of the same kinds."""
CONTENT_FREE = ("N/A", "[MASK]", "...", "Lorem ipsum.")
"""Questions without content, after Zhao et al. 2021 (arXiv 2102.09690)."""


@dataclass(frozen=True)
class Judged:
    """A question with its answer and a label that is not in doubt."""

    question: str
    answer: str
    system: int


@dataclass(frozen=True)
class Brief:
    """What a persona is told beside the example."""

    target: str
    """The model that a role-playing voter plays."""
    show_answer: bool
    words: tuple[str, str] | None = None
    """Label words; none: the persona's own."""
    shots: tuple[Judged, ...] = ()


def read_judged(path: Path) -> list[Judged]:
    """Rows with question, answer and system (1 or 2); DataError lists every other one."""
    found, bad = [], []
    for number, row in read_jsonl(path):
        if row.get("system") in (1, 2) and isinstance(row.get("question"), str):
            found.append(Judged(row["question"], str(row.get("answer", "")), row["system"]))
        else:
            bad.append(f"{path}:{number}")
    if bad:
        raise problems("a labelled example needs question, answer and system 1 or 2", bad)
    if len({row.system for row in found}) < 2:
        raise DataError(f"{path} has examples of one system only")
    return found


def shots(path: Path, number: int) -> tuple[Judged, ...]:
    """The first `number` examples of a file, System 1 and 2 by turns."""
    rows = read_judged(path)
    ones, twos = ([row for row in rows if row.system == k] for k in (1, 2))
    return tuple(row for pair in zip(ones, twos, strict=False) for row in pair)[: number - number % 2]


@personas.add("chat")
def role_play(example: Example, brief: Brief) -> Ballot:
    """The paper's: judge as the named target model would, in a chat, from criteria, question and answer."""
    system = f"You are {brief.target}. Judge each question as you would meet it yourself, briefly."
    return _chat(system, example, brief, f"Which system does {brief.target} need?")


@personas.add("chat")
def judge(example: Example, brief: Brief) -> Ballot:
    """`role_play` without the role: the paper's ablation."""
    return _chat(
        "You judge how much thought a question needs, briefly.", example, brief, "Which system does it need?"
    )


def _chat(system: str, example: Example, brief: Brief, ask: str) -> Ballot:
    one, two = words = brief.words or ("System1", "System2")
    criteria = (
        f"{one}: immediate recall, plain reading comprehension, or one simple step. "
        f"{two}: several steps of reasoning, chaining of facts, or a complex inference."
    )
    answer = f"\nAnswer: {example.response}" if brief.show_answer else ""
    user = f"{criteria}\n\nQuestion: {example.prompt}{answer}\n\n{ask} Answer {one} or {two}."
    return Ballot([{"role": "system", "content": system}, {"role": "user", "content": user}], words)


@personas.add("few-shot")
def steps(example: Example, brief: Brief) -> Ballot:
    """Few-shot completion, one or many steps; for small models."""
    one, two = words = brief.words or ("one", "many")
    return _few_shot(
        f"How many steps does each question need, {one} or {two}?", "Steps:", words, example, brief
    )


@personas.add("few-shot")
def effort(example: Example, brief: Brief) -> Ballot:
    """Few-shot completion, easy or hard; for small models."""
    one, two = words = brief.words or ("easy", "hard")
    head = f"Label each question. {one} = it needs only recall or one simple step; {two} = it needs several steps of reasoning."
    return _few_shot(head, "Label:", words, example, brief)


@personas.add()
def simplicity(example: Example, brief: Brief) -> Ballot:
    """Zero-shot completion, simple or complex; for small models."""
    one, two = brief.words or ("simple", "complex")
    return Ballot(
        f"{_question(example.prompt, example.response, brief)}\nThis question is", (f" {one}", f" {two}")
    )


def _question(question: str, answer: str, brief: Brief) -> str:
    return f"Question: {question}" + (f"\nAnswer: {_worked(answer)}" if brief.show_answer else "")


def _worked(answer: str) -> str:
    """The reasoning of a reference answer on one line, without the final answer that follows it."""
    return " ".join(answer.partition("####")[0].split())


def _few_shot(head: str, cue: str, words: tuple[str, str], example: Example, brief: Brief) -> Ballot:
    shown = [
        f"{_question(row.question, row.answer, brief)}\n{cue} {words[row.system - 1]}" for row in brief.shots
    ]
    text = "\n\n".join([head, *shown, f"{_question(example.prompt, example.response, brief)}\n{cue}"])
    return Ballot(text, (f" {words[0]}", f" {words[1]}"))


def as_example(row: Judged) -> Example:
    """A labelled example as a voter meets it."""
    return Example(f"held_out/{row.question}", row.question, row.answer, None)


def is_judged(example: Example) -> bool:
    return example.id.startswith("held_out/")


def empty(text: str) -> Example:
    return Example(f"content_free/{text}", text, text, None)
