"""A set that surface cannot label: pairs of questions, one of each system, alike in all that can be counted.

    python benchmarks/matched.py FILE.jsonl [--pairs 60] [--seed 0]

Rows have question, answer, system and kind. The two of a pair have equal length, form and count of numbers:
word count, count of numbers and yes/no form each separate the set with AUC .5 exactly, so whatever a voter
reaches on it comes from reading.
"""

import json
import random
from pathlib import Path
from typing import Any

from measure import options

NAMES = ("Ana", "Bo", "Cy", "Dora", "Eli", "Fay", "Gus", "Hana", "Ivo", "Jon", "Kai", "Lena")
THINGS = ("pens", "shells", "bags", "stamps", "plums", "keys", "cards", "rings")
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")

Pair = tuple[tuple[str, str], tuple[str, str]]
"""Question and answer for System 1, the same for System 2."""


def holders(rng: random.Random) -> Pair:
    (a, b, c), t = rng.sample(NAMES, 3), rng.choice(THINGS)
    x, y, z = rng.randint(4, 12), rng.randint(5, 12), rng.randint(1, 4)
    one = f"{a} has {x} {t}, {b} has {y} {t} and {c} has {z} {t}. How many {t} does {b} have?"
    two = f"{a} has {x} {t}, {b} has {y} more, {c} has {z} less than {b}. How many has {c} now?"
    return (one, f"{b} has {y}."), (two, f"{x} + {y} = {x + y}. {x + y} - {z} = {x + y - z}.")


def opening(rng: random.Random) -> Pair:
    start, end, n = rng.randint(6, 10), rng.randint(16, 21), rng.randint(2, 3)
    sells = f"sells {n} hats before noon"
    one = f"A shop opens at {start}, {sells} and closes at {end}. When does the shop close?"
    two = f"A shop opens at {start}, rests {n} hours at noon and closes at {end}. How long is it open?"
    worked = f"{end} - {start} = {end - start}. {end - start} - {n} = {end - start - n}."
    return (one, f"It closes at {end}."), (two, worked)


def boxes(rng: random.Random) -> Pair:
    a, b, c = rng.randint(3, 9), rng.randint(3, 9), rng.randint(12, 50)
    one = f"Does a box of {c} eggs, which costs {a} coins, hold more than {b} eggs?"
    two = f"Do {a} boxes of {b} eggs hold more than {c} eggs if put together then?"
    worked = f"{a} * {b} = {a * b}. {'Yes' if a * b > c else 'No'}."
    return (one, f"{c} is more than {b}. Yes."), (two, worked)


def ages(rng: random.Random) -> Pair:
    a, b, c = rng.sample(NAMES, 3)
    one = f"{a} is older than {b}. {c} has a red car and a dog. Who is older, {a} or {b}?"
    two = f"{a} is older than {b}. {c} is older than {a}, as we know. Who is youngest of these three?"
    return (one, f"{a} is older."), (two, f"{c} is older than {a}. {a} is older than {b}. So {b}.")


def bags(rng: random.Random) -> Pair:
    name, t = rng.choice(NAMES), rng.choice(THINGS)
    x, y, z = rng.randint(8, 20), rng.randint(5, 9), rng.randint(2, 7)
    one = f"{name} buys {x} {t}. The bus leaves at {y}. {name} gives {z} {t} away. How many {t} are left?"
    two = (
        f"{name} buys {x} {t}. Then {name} finds {y} more. {name} gives {z} {t} away. How many {t} are left?"
    )
    return (one, f"{x} - {z} = {x - z}."), (two, f"{x} + {y} = {x + y}. {x + y} - {z} = {x + y - z}.")


def days(rng: random.Random) -> Pair:
    at, n = rng.randrange(7), rng.randint(2, 4)
    one = f"It is {DAYS[at]}, and the shop is closed for all of {n} days. What day is it?"
    two = f"It was {DAYS[at]} on the day before yesterday, in {n} days I leave. What day is that?"
    today, then = DAYS[(at + 2) % 7], DAYS[(at + 2 + n) % 7]
    return (one, f"It is {DAYS[at]}."), (two, f"Today is {today}. In {n} days it is {then}.")


KINDS = (holders, opening, boxes, ages, bags, days)


def rows(pairs: int, seed: int) -> list[dict[str, Any]]:
    """`pairs` pairs of unlike questions, kinds by turns."""
    rng = random.Random(seed)
    found: list[dict[str, Any]] = []
    seen: set[str] = set()
    while len(found) < 2 * pairs:
        kind = KINDS[len(found) // 2 % len(KINDS)]
        pair = kind(rng)
        if not seen & {question for question, _ in pair}:
            seen |= {question for question, _ in pair}
            found += [
                {"question": q, "answer": a, "system": k, "kind": kind.__name__}
                for k, (q, a) in enumerate(pair, 1)
            ]
    return found


if __name__ == "__main__":
    given = options(__doc__, "file", pairs=60, seed=0).parse_args()
    lines = (json.dumps(row) + "\n" for row in rows(given.pairs, given.seed))
    Path(given.file).write_text("".join(lines), encoding="utf-8")
