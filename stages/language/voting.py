"""What voters are asked, and how their votes become a label.

A persona turns an example into a Ballot: a prompt and the two words between which the voter chooses. `role_play` is the
paper's and is for strong models; the few-shot ones are for small models, for which the label words decide more than
anything else.
"""

from __future__ import annotations

from dataclasses import dataclass

from stages.engines import Ballot
from stages.records import Example, Labelled
from stages.registry import Registry

personas: Registry = Registry("persona")

CRITERIA = (
    "System1: immediate recall, plain reading comprehension, or one simple step. "
    "System2: several steps of reasoning, chaining of facts, or a complex inference."
)

# Labelled examples of the few-shot personas, question and worked answer, in pairs (System 1, System 2): recall, reading, one
# step and yes/no questions on the first side, terse and wordy chains and yes/no questions on the second. None is in the
# demonstration set.
SHOTS = [
    (
        ("Which animal barks?", "The dog barks."),
        (
            "A van carries 6 crates of 8 melons. 9 melons rot. The rest goes to 3 shops in equal parts. How many per shop?",
            "6 * 8 = 48. 48 - 9 = 39. 39 / 3 = 13.",
        ),
    ),
    (
        (
            "The bakery on the hill, which has a blue door and 3 large windows, sells 25 rolls before noon and 14 rolls after "
            "noon. How many rolls does it sell before noon?",
            "It sells 25 rolls before noon.",
        ),
        ("Jo has 9 stickers. She buys 4 more and gives 5 away. How many stickers are left?", "9 + 4 = 13. 13 - 5 = 8."),
    ),
    (
        (
            "It is a cold morning and 5 crows sit on the roof. Lea has 11 pencils and borrows 6. How many has Lea?",
            "11 + 6 = 17.",
        ),
        ("Pia has 4 tubs of 6 buttons. She loses 5 buttons. How many buttons does Pia have now?", "4 * 6 = 24. 24 - 5 = 19."),
    ),
    (
        ("Is ice colder than steam?", "Yes, ice is colder."),
        (
            "Could someone born in 1990 have voted, at 18, in an election held 15 years later?",
            "1990 + 15 = 2005. 2005 - 1990 = 15, and 15 is less than 18. No.",
        ),
    ),
    (
        (
            "A train with 12 wagons waits at platform 4. Dan owns 3 kites and loses 1. How many kites does Dan own?",
            "3 - 1 = 2.",
        ),
        ("Uli has 8 marbles. He doubles them. He hands 7 to Kim. How many has Uli?", "8 * 2 = 16. 16 - 7 = 9."),
    ),
    (
        (
            "Iris packs 5 green scarves, 16 grey scarves and 2 red scarves. How many grey scarves?",
            "Iris packs 16 grey scarves.",
        ),
        (
            "Tess is older than Bo. Bo is older than Al. Al is older than Vi. Who is the second oldest?",
            "Tess is before Bo. Bo is before Al. Al is before Vi. So Bo is second.",
        ),
    ),
    (
        ("What is the third month of the year?", "The third month is March."),
        ("Ed has 7 kites. He buys 2 sets of 3 kites. He sells 4. How many are left?", "2 * 3 = 6. 7 + 6 = 13. 13 - 4 = 9."),
    ),
    (
        ("On the wall hangs a map with 20 cities. Gus buys 7 nets with 3 lemons each. How many lemons?", "7 * 3 = 21."),
        ("Moe finds 6 feathers, finds another 3 and then loses 2. How many feathers has Moe?", "6 + 3 = 9. 9 - 2 = 7."),
    ),
]


@dataclass(frozen=True)
class Target:
    """Whom a role-playing voter plays."""

    name: str
    show_answer: bool


@personas.add
def role_play(example: Example, target: Target) -> Ballot:
    """The paper's: judge as the named target model would, in a chat, from criteria, question and answer."""
    system = f"You are {target.name}. Judge each question as you would meet it yourself, briefly."
    return Ballot(_chat(system, example, target, f"Which system does {target.name} need?"), ("System1", "System2"))


@personas.add
def judge(example: Example, target: Target) -> Ballot:
    """`role_play` without the role: the paper's ablation."""
    system = "You judge how much thought a question needs, briefly."
    return Ballot(_chat(system, example, target, "Which system does it need?"), ("System1", "System2"))


def _chat(system: str, example: Example, target: Target, ask: str) -> list[dict[str, str]]:
    answer = f"\nAnswer: {example.response}" if target.show_answer else ""
    user = f"{CRITERIA}\n\nQuestion: {example.prompt}{answer}\n\n{ask} Answer System1 or System2."
    return [{"role": "system", "content": system}, {"role": "user", "content": user}]


@personas.add
def steps(example: Example, target: Target) -> Ballot:
    """Few-shot completion, one or many steps; for small models."""
    return _few_shot("How many steps does each question need, one or many?", "Steps:", (" one", " many"), example, target)


@personas.add
def effort(example: Example, target: Target) -> Ballot:
    """Few-shot completion, easy or hard; for small models."""
    head = "Label each question. easy = it needs only recall or one simple step; hard = it needs several steps of reasoning."
    return _few_shot(head, "Label:", (" easy", " hard"), example, target)


@personas.add
def simplicity(example: Example, target: Target) -> Ballot:
    """Zero-shot completion, simple or complex; for small models."""
    return Ballot(f"{_question(example.prompt, example.response, target)}\nThis question is", (" simple", " complex"))


def _question(question: str, answer: str, target: Target) -> str:
    return f"Question: {question}" + (f"\nAnswer: {_worked(answer)}" if target.show_answer else "")


def _worked(answer: str) -> str:
    """The reasoning of a reference answer on one line, without the final answer that follows it."""
    return " ".join(answer.partition("####")[0].split())


def _few_shot(head: str, cue: str, words: tuple[str, str], example: Example, target: Target) -> Ballot:
    shots = [
        f"{_question(question, answer, target)}\n{cue}{word}"
        for pair in SHOTS
        for (question, answer), word in zip(pair, words, strict=True)
    ]
    return Ballot("\n\n".join([head, *shots, f"{_question(example.prompt, example.response, target)}\n{cue}"]), words)


def decide(
    examples: list[Example], votes: dict[str, dict[str, float]], share: float | None, min_agreement: float
) -> list[Labelled]:
    """Labels by majority of the voters; ties go by the mean probability, and 2 where that ties too.

    votes: per voter, per example id, the probability of System 2. A voter votes 2 above 0.5, or, with `share` known, for
    that share of the examples about which it is surest. Below `min_agreement` equal votes an example is undecided (None).
    """
    twos_of = {voter: twos(given, share) for voter, given in votes.items()}
    thresholds = {
        voter: min((given[id] for id in twos_of[voter]), default=1.0) if share else 0.5 for voter, given in votes.items()
    }
    rows = []
    for example in examples:
        given = {voter: votes[voter][example.id] for voter in votes}
        number = sum(example.id in twos_of[voter] for voter in given)
        margin = sum(value - thresholds[voter] for voter, value in given.items())
        tied = 2 * number == len(given)
        system: int | None = 2 if (margin >= 0 if tied else 2 * number > len(given)) else 1
        if max(number, len(given) - number) / len(given) < min_agreement:
            system = None
        rows.append(Labelled(example, system, given))
    return rows


def twos(given: dict[str, float], share: float | None) -> set[str]:
    """The examples for which a voter votes 2; equal probabilities go by the id, so that a share is met exactly."""
    if share is None:
        return {id for id, value in given.items() if value > 0.5}
    return set(sorted(given, key=lambda id: (-given[id], id))[: round(share * len(given))])
