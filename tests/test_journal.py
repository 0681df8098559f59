"""The journal of answers: what a kill leaves of it, and several runs that share it."""

import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from pydantic import BaseModel

from stages.errors import ArtifactError, DataError
from stages.store.journal import Journal


class Anything(BaseModel):
    """The shape of any answer."""


def test_threads_of_one_process_take_turns(tmp_path: Path):
    """As two runs do: two voters whose questions alone differ share a journal, each in its thread."""
    inside: list[str] = []
    said: list[str] = []
    seen: list[list[str]] = []

    def lane(name: str) -> None:
        journal = Journal(tmp_path / "j.jsonl", Anything)
        with journal.writing(said.append):
            inside.append(name)
            for n in range(20):
                journal.add((name, n), {})
                time.sleep(0.002)
                assert inside == [name]
            inside.pop()
            seen.append([other for other in "ab" if (other, 0) in journal])

    with ThreadPoolExecutor() as pool:
        list(pool.map(lane, "ab"))
    assert len(seen[0]) == 1 and seen[1] == ["a", "b"], "the later one finds the answers of the other"
    assert said == ["another process is writing to j.jsonl: waiting"]
    assert all((name, n) in Journal(tmp_path / "j.jsonl", Anything) for name in "ab" for n in range(20))


class Share(BaseModel):
    share: float
