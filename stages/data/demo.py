"""Generates the demonstration set: questions whose intended system is known, from a seed.

System 1 items are answered by recall, by reading one number off the text, or by one operation. System 2
items need a chain of two operations. All items are built from the same sentences, and System 1 items have
more asides (irrelevant sentences), so that neither the length nor any single word separates the systems (a
test asserts this). The intended system is in the field `intended`, which no stage reads by default.

The output depends on the order in which the functions call the random generator.
"""

import random
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from stages.records import write_jsonl
from stages.store.whole_files import whole_files

SPLITS = {
    "train": {"recall": 19, "reading": 29, "one_step": 72, "two_step": 120},
    "test": {"one_step": 100, "two_step": 200},
}
"""Split → kind of item → number of these. Splits and kinds are generated in this order."""
FEW = "train-few"
"""The rows of `train`, of which WORKED two-step ones are worked; the others have their final answer alone."""
WORKED = 20
STEPS = {"one_step": 1, "two_step": 2}
"""Kind of chain → its number of operations."""

# fmt: off
NAMES = ["Mia", "Tom", "Ana", "Leo", "Zoe", "Sam", "Ida", "Ben", "Eva", "Max",
         "Lily", "Omar", "Nina", "Paul", "Rosa", "Hugo", "Kate", "Finn", "Amy", "Raj"]
THINGS = ["apples", "pens", "cards", "books", "stamps", "shells", "coins", "beads", "eggs",
          "plums", "cups", "keys", "balls", "cakes", "rings", "seeds", "nuts", "figs"]
BOXES = ["bags", "boxes", "packs", "jars", "baskets", "crates", "trays", "tins"]
COLOURS = ["red", "green", "blue", "white", "black", "yellow", "brown", "grey"]
CAPITALS = {"Italy": "Rome", "Spain": "Madrid", "Japan": "Tokyo", "Russia": "Moscow", "Greece": "Athens",
            "China": "Beijing", "England": "London", "Austria": "Vienna"}
ASIDES = ["The market on the square opens at {n}.", "The walk home takes {n} minutes.",
          "There are {n} people in the queue.", "The old clock on the wall shows {n}.",
          "The corner house has {n} windows.", "A bus with {n} empty seats stops here.",
          "Grandmother walked {n} times around the park.", "The radio plays song number {n} again."]
# fmt: on

# (question, sentence that answers it, answer): facts that a small pretrained model may have seen.
FACTS = [
    ("How many months are in a year?", "A year has 12 months.", "12"),
    ("How many hours are in a day?", "A day has 24 hours.", "24"),
    ("How many seconds are in a minute?", "A minute has 60 seconds.", "60"),
    ("How many legs does a spider have?", "A spider has 8 legs.", "8"),
    ("How many legs does a dog have?", "A dog has 4 legs.", "4"),
    ("How many sides does a triangle have?", "A triangle has 3 sides.", "3"),
    ("How many sides does a hexagon have?", "A hexagon has 6 sides.", "6"),
    ("How many sides does a pentagon have?", "A pentagon has 5 sides.", "5"),
    ("How many wheels does a bicycle have?", "A bicycle has 2 wheels.", "2"),
    ("How many wheels does a car have?", "A car has 4 wheels.", "4"),
    ("How many eggs are in a dozen?", "A dozen is 12 eggs.", "12"),
    ("How many planets orbit the Sun?", "8 planets orbit the Sun.", "8"),
    ("How many years are in a century?", "A century has 100 years.", "100"),
    ("How many years are in a decade?", "A decade has 10 years.", "10"),
    ("How many arms does an octopus have?", "An octopus has 8 arms.", "8"),
    ("How many continents are there?", "There are 7 continents.", "7"),
    *(
        (f"What is the capital of {country}?", f"The capital of {country} is {city}.", city)
        for country, city in CAPITALS.items()
    ),
    ("What colour is grass?", "Grass is green.", "green"),
    ("What colour is a ripe banana?", "A ripe banana is yellow.", "yellow"),
    *(
        (f"What is the opposite of {word}?", f"The opposite of {word} is {other}.", other)
        for word, other in (("hot", "cold"), ("big", "small"), ("day", "night"))
    ),
]
UNSEEN_EVERY = 3
"""A third of all worked answers, by their checksum, is only in `test`.

Names and things are not part of a chain's worked answer, so an unseen chain is new in its numbers, too.
Without this rule, 61 to 67 % of one-step test items had their worked answer in `train`.
"""


Item = dict[str, str | int]
"""A row: question, worked answer (its last line is `#### ` and the final one), intended system, and kind.

In FEW most rows have `gold`, the final answer, in place of the worked one."""


@dataclass
class _Story:
    """A quantity, the sentences that change it, and the operations that these describe."""

    name: str
    thing: str
    value: int
    sentences: list[str]
    operations: list[str]

    def apply(self, sign: str, n: int, sentence: str) -> None:
        result = {"+": self.value + n, "-": self.value - n, "*": self.value * n}[sign]
        self.operations.append(f"{self.value} {sign} {n} = {result}")
        self.value = result
        self.sentences.append(sentence)


def write(folder: Path, seed: int) -> dict[str, int]:
    """Write one file per split to `folder`, and FEW; return the number of items in each.

    OutputError if a file has other rows. The same seed gives the same bytes. The splits share no question and
    no worked answer.
    """
    rng = random.Random(seed)
    questions: set[str] = set()
    # `make` takes the last file as proof of all.
    names = ("train", FEW, "test")
    with whole_files([folder / f"{name}.jsonl" for name in names], "another folder") as files:
        for new, name in zip(files, names, strict=True):
            if name != FEW:
                items = list(_items(rng, name, questions))
                rng.shuffle(items)
            write_jsonl(new, _with_few_worked(items) if name == FEW else items)
    return {name: sum(SPLITS[name.partition("-")[0]].values()) for name in names}


def _with_few_worked(items: list[Item]) -> Iterator[Item]:
    two_steps = 0
    for item in items:
        two_steps += item["kind"] == "two_step"
        if item["kind"] == "two_step" and two_steps > WORKED:
            answer = str(item["answer"])
            item = {name: value for name, value in item.items() if name != "answer"}
            item["gold"] = answer.rpartition("#### ")[2]
        yield item


def _items(rng: random.Random, split: str, questions: set[str]) -> Iterator[Item]:
    """Yield the items of one split; their questions are added to `questions`, and none there is repeated."""
    makers = {"recall": partial(_recall, rng), "reading": partial(_reading, rng)}
    makers |= {kind: partial(_chain, rng, kind) for kind in STEPS}
    for kind, number in SPLITS[split].items():
        written = 0
        while written < number:
            item = makers[kind]()
            is_unseen = zlib.crc32(str(item["answer"]).encode()) % UNSEEN_EVERY == 0
            in_place = kind == "recall" or is_unseen == (split == "test")
            if in_place and item["question"] not in questions:
                questions.add(str(item["question"]))
                written += 1
                yield item


def _item(
    rng: random.Random, sentences: list[str], worked: str, gold: str, intended: int, kind: str, asides: int
) -> Item:
    leading = [rng.choice(ASIDES).format(n=rng.randint(4, 12)) for _ in range(asides)]
    question, answer = " ".join(leading + sentences), f"{worked}\n#### {gold}"
    return {"question": question, "answer": answer, "intended": intended, "kind": kind}


def _recall(rng: random.Random) -> Item:
    """Ask for a fact."""
    question, sentence, gold = rng.choice(FACTS)
    return _item(rng, [question], sentence, gold, 1, "recall", rng.randint(0, 2))


def _reading(rng: random.Random) -> Item:
    """Ask for one of three numbers in the text."""
    name, thing, box = rng.choice(NAMES), rng.choice(THINGS), rng.choice(BOXES)
    colours, counts = rng.sample(COLOURS, 3), rng.sample(range(2, 20), 3)
    target = rng.randrange(3)
    listed = ", ".join(f"{n} {c} {thing}" for n, c in zip(counts, colours, strict=True))
    story = f"{name} packs {listed} and some old {box}."
    question = f"How many {colours[target]} {thing} does {name} pack?"
    worked = f"{name} packs {counts[target]} {colours[target]} {thing}."
    return _item(rng, [story, question], worked, str(counts[target]), 1, "reading", rng.randint(0, 2))


def _chain(rng: random.Random, kind: str) -> Item:
    """Ask for the result of some operations on one quantity."""
    steps = STEPS[kind]
    story = _Story(rng.choice(NAMES), rng.choice(THINGS), 0, [], [])
    if rng.random() < 0.5:
        story.value, n, box = rng.randint(2, 6), rng.randint(2, 6), rng.choice(BOXES)
        story.apply("*", n, f"{story.name} buys {story.value} {box} with {n} {story.thing} each.")
    else:
        story.value = rng.randint(3, 15)
        story.sentences.append(f"{story.name} has {story.value} {story.thing}.")
    while len(story.operations) < steps:
        _change(rng, story)
    when = rng.choice(["now", "in the end", "then", "after that"])
    question = f"How many {story.thing} does {story.name} have {when}?"
    # Questions of one step are shorter: more asides make their lengths those of longer chains.
    asides = rng.choice([0, 1, 1, 2, 2]) if steps == 1 else rng.choice([0, 0, 0, 1])
    worked = ". ".join(story.operations) + "."
    intended = 1 if steps == 1 else 2
    return _item(rng, [*story.sentences, question], worked, str(story.value), intended, kind, asides)


def _change(rng: random.Random, story: _Story) -> None:
    """Add to the quantity, take from it, or multiply it, where the numbers stay small."""
    signs = ["+", *(["-"] if story.value > 2 else []), *(["*"] if story.value <= 12 else [])]
    sign = rng.choice(signs)
    texts = {
        "+": ["{name} finds {n} more.", "{name} gets another {n} from a friend.",
              "{name} buys another {n} {thing}."],
        "-": ["{name} gives {n} to a sister.", "{name} loses {n} of them.",
              "{name} sells {n} of the {thing}."],
    }  # fmt: skip
    if sign == "*":
        n, text = rng.randint(2, 3), "The next day {name} has {n} times as many."
    else:
        n = rng.randint(2, 9) if sign == "+" else rng.randint(1, min(9, story.value - 1))
        text = rng.choice(texts[sign])
    story.apply(sign, n, text.format(name=story.name, n=n, thing=story.thing))
