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


def test_a_torn_last_line_is_cut_off_and_what_was_whole_stays(tmp_path: Path):
    path = tmp_path / "votes/j.jsonl"
    journal = Journal(path, Anything)
    with journal.writing(print):
        journal.add(("a", 0), {"mass": 1})
        journal.note("fingerprint", ["x"])
    with path.open("ab") as file:
        file.write(b'{"question": "b", "sam')
    journal = Journal(path, Anything)
    assert ("a", 0) in journal and journal["a", 0] == {"mass": 1} and journal.notes == {"fingerprint": ["x"]}
    with journal.writing(print):
        journal.add(("b", 1), {"text": "a\rb\u2028c"})
        journal.add(("a", 0), {"mass": 2})
    assert len(path.read_bytes().splitlines()) >= 3
    again = Journal(path, Anything)
    assert again["b", 1] == {"text": "a\rb\u2028c"} and again["a", 0] == {"mass": 2}  # the later one counts


def test_what_is_set_aside_is_forgotten_and_kept_by_everyone(tmp_path: Path):
    one, two = Journal(tmp_path / "j.jsonl", Anything), Journal(tmp_path / "j.jsonl", Anything)
    with one.writing(print):
        one.add(("a", 0), {})
    with two.writing(print):
        assert two.set_aside() == 1
        assert ("a", 0) not in two
        two.add(("b", 0), {"text": "longer than the file that was set aside"})
    with one.writing(print):
        assert ("a", 0) not in one and ("b", 0) in one
        one.add(("c", 0), {})
        assert one.set_aside() == 2
    fresh = Journal(one.path, Anything)
    assert ("a", 0) not in fresh and ("c", 0) not in fresh
    olds = [(tmp_path / f"j.{n}.old").read_text().count("question") for n in (1, 2)]
    assert olds == [1, 2]


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


def test_a_broken_line_is_named_and_the_journal_is_free_again(tmp_path: Path):
    """Lines are counted from the beginning of the file, also those that others added after it was read."""
    path = tmp_path / "j.jsonl"
    journal = Journal(path, Anything)
    path.write_text('{"question": "a", "sample": 0}\n')
    with journal.writing(print):
        journal.add(("b", 0), {})
    with path.open("a") as file:
        file.write('{"question": "c", "sample": 0}\n{broken\n')
    for _ in range(2):
        with pytest.raises(DataError, match=r"broken JSON line: .*j\.jsonl:4"), journal.writing(print):
            pytest.fail("it was opened")


class Share(BaseModel):
    share: float


@pytest.mark.parametrize(
    "line",
    ["{}", '{"question": ["a"], "sample": 0, "share": 1}', '{"question": "a", "sample": 0, "share": "much"}'],
)
def test_a_line_that_is_no_answer_is_named(tmp_path, line):
    path = tmp_path / "j.jsonl"
    path.write_text('{"question": "a", "sample": 0, "share": 1}\n' + line + "\n")
    with pytest.raises(ArtifactError, match=f"{path}:2 is not a valid answer: ") as caught:
        Journal(path, Share)
    assert caught.value.hint == "move the file away, and the same command asks again"


def test_an_answer_that_was_edited_is_asked_again(tmp_path, caplog):
    """Lines of earlier versions have no seal, and stand before those that have one."""
    path = tmp_path / "j.jsonl"
    path.write_text('{"question": "old", "sample": 0, "share": 1}\n')
    journal = Journal(path, Share)
    with journal.writing(print):
        for name in "abcd":
            journal.add((name, 0), {"share": 0.5})
        journal.note("fingerprint", [0.5])
    whole = path.read_text()
    old, a, b, c, d, note = whole.splitlines()
    (edited := json.loads(b)).pop("seal")
    harmed = [a.replace("0.5", "0.9"), json.dumps(edited), d.replace('"d"', '"a"'), note.replace("5", "6")]
    path.write_text("\n".join([old, *harmed[:2], c, *harmed[2:], ""]))
    found = Journal(path, Share)
    assert [name for name in ("old", *"abcd") if (name, 0) in found] == ["old", "c"] and found.notes == {}
    assert caplog.messages == [f"{path}: 4 lines were changed since they were written: left out"]
    path.write_text(whole + old.replace("old", "e") + "\n")  # by an earlier version, beside this one
    found = Journal(path, Share)
    assert ("d", 0) in found and ("e", 0) not in found


def test_half_a_line_is_not_kept_and_the_next_one_stands_alone(tmp_path: Path):
    """A nearly full disk takes part of a write without an error."""
    path = tmp_path / "j.jsonl"
    journal = Journal(path, Anything)
    with journal.writing(print):
        journal.add(("a", 0), {})
        usual = journal._file

        class Full:
            def write(self, line):
                return usual.write(line[:9])

        journal._file = Full()
        with pytest.raises(OSError, match="No space left"):
            journal.add(("b", 0), {})
        journal._file = usual
        journal.add(("c", 0), {})
    found = Journal(path, Anything)
    assert ("a", 0) in found and ("b", 0) not in found and ("c", 0) in found
