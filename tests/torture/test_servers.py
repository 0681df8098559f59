"""A server that fails at random gives the labels of a healthy one, and no question is kept twice."""

import json
import math
import random
from collections import Counter
from pathlib import Path

import pytest
from mock_server import OF_CHOICES, OF_REPLIES, Mock, classify, serve, system_of, voting, with_logprobs
from tally import FULL

from stages.engines import openai
from stages.errors import LoraparError
from stages.records import read_jsonl

pytestmark = pytest.mark.slow
ROWS = 60
SURE = math.log(0.99), math.log(0.01)


def impossible(rng: random.Random) -> str:
    """A reply in the right form, with probabilities that cannot be, or a field that stands twice."""
    low, high = sorted((rng.uniform(-3, -0.05), rng.uniform(-3, -0.05)))
    one, two = math.log(share := rng.uniform(0.05, 0.95)), math.log(1 - share)
    odd = rng.choice([
        (0, 0), (False, -0.1), ("0", "-9"), (9e-4, -9.0), (-0.1, -0.1), (high, 0.0), (0.0, -9999.0),
        (one, -9999.0), (one, two - 0.1), (one + 0.02, two), (one / math.log(2), two / math.log(2)),
    ])  # fmt: skip
    first, second = ('"choices": ' + json.dumps(chosen(*values)) for values in (odd, (low, high)))
    return "{" + (first if rng.random() < 0.5 else f"{second}, {second}") + "}"


def contradiction(rng: random.Random) -> str:
    """A vote of its own, in a reply that says that it is none."""
    (choice,) = chosen(*(SURE if rng.random() < 0.5 else SURE[::-1]))
    of_choice = rng.choice([*OF_CHOICES, {}])
    beside = {} if of_choice else rng.choice(OF_REPLIES)
    return json.dumps({"choices": [choice | of_choice], **beside})


def chosen(one: object, two: object) -> list[dict[str, object]]:
    taken = "2" if isinstance(one, float) and isinstance(two, float) and two > one else "1"
    return with_logprobs([("System", {"System": 0.0}), (taken, {"1": one, "2": two})], chat=True)["choices"]


def fault(rng: random.Random) -> tuple[str, object]:
    status = rng.choice([408, 425, 429, 500, 502, 503, 504])
    headers = {"Retry-After": rng.choice(["0", "0.01", "soon", "-1", ""])} if rng.random() < 0.5 else {}
    return rng.choice([
        ("reset", None), ("truncated", None), ("twice", None), ("status", (status, headers, "no")),
        ("body", rng.randbytes(rng.randint(0, 60))), ("body", "<html>"), ("body", "[" * 5000),
        ("body", impossible(rng)), ("body", impossible(rng)), ("body", contradiction(rng)),
        ("status", (rng.choice([202, 203, 206, 302, 307]), {}, json.dumps({"choices": chosen(*SURE)}))),
    ])  # fmt: skip


def test_servers_that_fail_at_random(tiny, tmp_path, tally, monkeypatch):
    monkeypatch.setattr(openai, "PAUSE_S", 0)
    for name in ("INITIAL_RETRY_DELAY", "MAX_RETRY_DELAY", "MAX_RETRY_AFTER_DELAY"):
        monkeypatch.setattr(f"openai._base_client.{name}", 0.01)
    config = voting(tmp_path, tiny, ROWS)

    def labels(mock: Mock, runs: str) -> list[int | None]:
        return system_of(classify(config(mock.url, runs, max_failed=0)))

    with serve(Mock()) as healthy:
        wanted = labels(healthy, "healthy")
    at = 0
    while tally.tried < (1000 if FULL else 100):
        at += 1
        share = tally.random.uniform(0.02, 0.3)

        def script(n: int, path: str, body: object, share: float = share) -> tuple[str, object] | None:
            if "zebra" in str(body) or tally.random.random() > share:
                return None
            tally.tried += 1
            return fault(tally.random)

        with serve(Mock(script)) as mock:
            runs, found = f"runs-{at}", None
            for _ in range(20):  # the same command goes on where it stopped
                try:
                    found = labels(mock, runs)
                    break
                except LoraparError:
                    continue
                except Exception as error:
                    tally.tracebacks.append(f"{type(error).__name__}: {error}"[:300])
                    break
            if found is None:
                mock.fault = None
                found = labels(mock, runs)
        if found != wanted:
            others = [pair for pair in zip(found, wanted, strict=True) if pair[0] != pair[1]]
            tally.lost.append(f"labels are others: {others}")
        (journal,) = (tmp_path / runs / "votes").glob("*.jsonl")
        asked = Counter(row["question"] for _, row in read_jsonl(Path(journal)) if "question" in row)
        if set(asked.values()) != {1}:
            tally.lost.append("a vote was kept twice")
