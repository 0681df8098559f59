"""The journal of answers: what a kill leaves of it, and several runs that share it."""

import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest.mock import Mock

import pytest
from pydantic import BaseModel

from stages.errors import ArtifactError, DataError
from stages.store.journal import SEAL, Journal, seal_of


class Anything(BaseModel):
    """The shape of any answer."""


class Share(BaseModel):
    share: float


def written(path: Path, *names: str) -> Journal:
    """A journal with an answer of each name."""
    journal = Journal(path, Anything)
    with journal.writing(print):
        for name in names:
            journal.add((name, 0), {"share": 0.5})
    return journal


def test_a_torn_last_line_is_cut_off_and_what_was_whole_stays(tmp_path: Path):
    path = written(tmp_path / "votes/j.jsonl", "a").path
    with path.open("ab") as file:
        file.write(b'{"question": "b", "sam')
    journal = Journal(path, Anything)
    assert ("a", 0) in journal and journal["a", 0] == {"share": 0.5}
    with journal.writing(print):
        journal.add(("b", 1), {"text": "a\rb\u2028c"})
        journal.add(("a", 0), {"mass": 2})
    assert path.read_bytes().count(b"\n") == 3
    again = Journal(path, Anything)
    assert again["b", 1] == {"text": "a\rb\u2028c"} and again["a", 0] == {"mass": 2}  # the later one counts


def test_a_file_that_was_moved_away_is_forgotten(tmp_path: Path):
    journal = written(tmp_path / "j.jsonl", "a")
    journal.path.rename(tmp_path / "old.jsonl")
    with journal.writing(print):
        assert ("a", 0) not in journal
        journal.add(("b", 0), {"text": "longer than the file that was moved away"})
    again = Journal(journal.path, Anything)
    assert ("a", 0) not in again and ("b", 0) in again


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


def sealed(**row: object) -> str:
    return json.dumps({**row, SEAL: seal_of(row)}) + "\n"


def test_a_broken_line_is_named_and_the_journal_is_free_again(tmp_path: Path):
    """Lines are counted from the beginning of the file, also those that others added after it was read."""
    path = tmp_path / "j.jsonl"
    journal = Journal(path, Anything)
    path.write_text(sealed(question="a", sample=0))
    with journal.writing(print):
        journal.add(("b", 0), {})
    with path.open("a") as file:
        file.write(sealed(question="c", sample=0) + "{broken\n")
    for _ in range(2):
        with pytest.raises(DataError, match=r"broken JSON line: .*j\.jsonl:4"), journal.writing(print):
            pytest.fail("it was opened")


@pytest.mark.parametrize(
    "row", [{}, {"question": ["a"], "sample": 0, "share": 1}, {"question": "a", "sample": 0, "share": "much"}]
)
def test_a_line_that_is_no_answer_is_named(tmp_path, row):
    path = tmp_path / "j.jsonl"
    path.write_text(sealed(question="a", sample=0, share=1) + sealed(**row))
    with pytest.raises(ArtifactError, match=f"{path}:2 is not a valid answer: ") as caught:
        Journal(path, Share)
    assert caught.value.hint == "move the file away, and the same command asks again"


def test_an_answer_that_was_edited_is_asked_again(tmp_path, caplog):
    path = tmp_path / "j.jsonl"
    written(path, *"abcd")
    a, b, c, d = path.read_text().splitlines()
    (without_seal := json.loads(b)).pop(SEAL)
    changed = [a.replace("0.5", "0.9"), json.dumps(without_seal), c, d.replace('"d"', '"a"')]
    path.write_text("\n".join([*changed, ""]))
    again = Journal(path, Share)
    assert [name for name in "abcd" if (name, 0) in again] == ["c"]
    assert caplog.messages == [f"{path}: 3 lines were changed since they were written: left out"]


def test_half_a_line_is_not_kept_and_the_next_one_stands_alone(tmp_path: Path):
    """A nearly full disk takes part of a write without an error."""
    journal = written(tmp_path / "j.jsonl", "a")
    with journal.writing(print):
        usual = journal._file
        journal._file = Mock(write=lambda line: usual.write(line[:9]))
        with pytest.raises(OSError, match="No space left"):
            journal.add(("b", 0), {})
        journal._file = usual
        journal.add(("c", 0), {})
    again = Journal(journal.path, Anything)
    assert ("a", 0) in again and ("b", 0) not in again and ("c", 0) in again
