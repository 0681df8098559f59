"""Personas of voters: each turns an example into a ChoiceRequest, a prompt and two words to choose from.

`role_play` is the persona of the paper and is for strong models. The few-shot personas are for small models,
whose votes depend on the label words more than on anything else.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from stages.config import SourceSection, Voter
from stages.data.rows import read
from stages.engines import ChoiceRequest
from stages.errors import DataError
from stages.labelling.known import with_known_labels
from stages.prompts.answers import split_final_answer
from stages.records import Example, Labelled
from stages.registry import Registry

personas: Registry = Registry("persona")
"""Traits: `chat`, for strong models, with a threshold of 0.5 (all others need calibration); `few-shot`, which
shows worked examples."""

HERE = Path(__file__).parent
SHOTS = HERE / "shots.jsonl"
"""Worked examples. System 1: recall, reading, one step, yes/no questions. System 2: terse chains, wordy
chains, yes/no questions. None of them is in the demonstration set or in HELD_OUT."""
HELD_OUT = HERE / "held_out.jsonl"
"""Labelled examples for calibration, 16 of each system, of the same kinds as in SHOTS."""


@dataclass(frozen=True)
class PersonaContext:
    """Settings from which a persona makes the prompt for an example."""

    target: str
    """Name of the model that a role-playing voter plays."""
    show_answer: bool
    words: tuple[str, str] | None = None
    """Label words for System 1 and 2; None: the persona's own."""
    shots: tuple[Labelled, ...] = ()
    """Worked examples: questions with their answers, and labels that are beyond doubt."""


def question_of(voter: Voter, target: str, show_answer: bool) -> Callable[[Example], ChoiceRequest]:
    """Return what makes the voter's prompt for an example.

    target: name of the model that a role-playing voter plays.
    """
    context = PersonaContext(target, show_answer, voter.words, shots_of(voter))
    return partial(personas.pick(voter.persona), context=context)


def shots_of(voter: Voter) -> tuple[Labelled, ...]:
    """The worked examples in the voter's prompt, System 1 and 2 in turn; none if its persona takes none.

    Raises DataError if the file has too few of one system.
    """
    if not personas.has_trait(voter.persona, "few-shot"):
        return ()
    path, of_each = Path(voter.shots_path or SHOTS), voter.shots // 2
    rows = read_labelled_examples(path)
    ones, twos = ([row for row in rows if row.system == system] for system in (1, 2))
    if min(len(ones), len(twos)) < of_each:
        numbers = f"{path.name} has {len(ones)} and {len(twos)}"
        raise DataError(f"{voter.shots} shots need {of_each} examples of each system, and {numbers}")
    return tuple(row for pair in zip(ones[:of_each], twos[:of_each], strict=True) for row in pair)


def read_labelled_examples(path: str | Path | None) -> list[Labelled]:
    """Read labelled examples from a file or, without one, lorapar's own for calibration.

    Rows may have any form, with `system` (1 or 2), with or without an answer; DataError for other rows.
    """
    path = path or HELD_OUT
    examples = read(SourceSection(path=str(path), empty="keep"))
    examples = [replace(row, id=f"held_out/{row.prompt}") for row in examples]
    rows = [row for row in with_known_labels(examples, "system", None) if row.system]
    if len({row.system for row in rows}) < 2:
        raise DataError(f"{path} has examples of one system only")
    return rows


@personas.add("chat")
def role_play(example: Example, context: PersonaContext) -> ChoiceRequest:
    """The paper's persona: in a chat, judge as the named model would, from criteria, question and answer."""
    system = f"You are {context.target}. Judge each question as you would meet it yourself, briefly."
    return _chat(system, example, context, f"Which system does {context.target} need?")


@personas.add("chat")
def judge(example: Example, context: PersonaContext) -> ChoiceRequest:
    """`role_play` without the role: the paper's ablation."""
    system = "You judge how much thought a question needs, briefly."
    return _chat(system, example, context, "Which system does it need?")


def _chat(system: str, example: Example, context: PersonaContext, question: str) -> ChoiceRequest:
    """A chat with the criteria, the example and the question which system it needs."""
    system1, system2 = words = context.words or ("System1", "System2")
    criteria = (
        f"{system1}: immediate recall, plain reading comprehension, or one simple step. "
        f"{system2}: several steps of reasoning, chaining of facts, or a complex inference."
    )
    answer = f"\nAnswer: {example.response}" if context.show_answer and example.response else ""
    user = (
        f"{criteria}\n\nQuestion: {example.conversation}{answer}\n\n{question} Answer {system1} or {system2}."
    )
    return ChoiceRequest([{"role": "system", "content": system}, {"role": "user", "content": user}], words)


@personas.add("few-shot")
def steps(example: Example, context: PersonaContext) -> ChoiceRequest:
    """Few-shot completion: does the question need one step or many? For small models."""
    words = context.words or ("one", "many")
    head = f"How many steps does each question need, {words[0]} or {words[1]}?"
    return _few_shot(head, "Steps:", words, example, context)


@personas.add("few-shot")
def effort(example: Example, context: PersonaContext) -> ChoiceRequest:
    """Few-shot completion: is the question easy or hard? For small models."""
    easy, hard = words = context.words or ("easy", "hard")
    head = (
        f"Label each question. {easy} = it needs only recall or one simple step; "
        f"{hard} = it needs several steps of reasoning."
    )
    return _few_shot(head, "Label:", words, example, context)


@personas.add()
def simplicity(example: Example, context: PersonaContext) -> ChoiceRequest:
    """Zero-shot completion: is the question simple or complex? For small models."""
    words = context.words or ("simple", "complex")
    question = _question(example, context)
    return ChoiceRequest(f"{question}\nThis question is", (f" {words[0]}", f" {words[1]}"))


def _question(example: Example, context: PersonaContext) -> str:
    """The question, and if answers are shown, its reasoning on one line, without the final answer."""
    reasoning, *_ = split_final_answer(example.response) or [example.response]
    reasoning = " ".join(reasoning.split()) if context.show_answer else ""
    return f"Question: {example.conversation}" + (f"\nAnswer: {reasoning}" if reasoning else "")


def _few_shot(
    head: str, cue: str, words: tuple[str, str], example: Example, context: PersonaContext
) -> ChoiceRequest:
    """A completion after worked examples, each a question and the word for its system after `cue`."""
    word = {1: words[0], 2: words[1]}
    worked = (f"{_question(row.example, context)}\n{cue} {word[row.system or 1]}" for row in context.shots)
    text = "\n\n".join([head, *worked, f"{_question(example, context)}\n{cue}"])
    return ChoiceRequest(text, (f" {words[0]}", f" {words[1]}"))
