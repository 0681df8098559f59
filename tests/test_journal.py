"""The journal of answers: what a kill leaves of it, and several runs that share it."""

import multiprocessing
import time
from pathlib import Path

import pytest

from stages.errors import DataError
from stages.store.journal import Journal


def test_a_torn_last_line_is_cut_off_and_what_was_whole_stays(tmp_path: Path):
    path = tmp_path / "votes/j.jsonl"
    journal = Journal(path)
    with journal.writing(print):
        journal.keep(("a", 0), {"mass": 1})
        journal.note("fingerprint", ["x"])
    with path.open("ab") as file:
        file.write(b'{"question": "b", "sam')
    journal = Journal(path)
    assert ("a", 0) in journal and journal["a", 0] == {"mass": 1} and journal.notes == {"fingerprint": ["x"]}
    with journal.writing(print):
        journal.keep(("b", 1), {"text": "a\rb\u2028c"})
    assert len(path.read_bytes().splitlines()) >= 3
    assert Journal(path)["b", 1] == {"text": "a\rb\u2028c"}


def test_a_line_that_repeats_an_earlier_one_changes_nothing(tmp_path: Path):
    path = tmp_path / "j.jsonl"
    path.write_text('{"question": "a", "sample": 0, "mass": 1}\n{"question": "a", "sample": 0, "mass": 2}\n')
    assert Journal(path)["a", 0] == {"mass": 1}


def test_what_is_set_aside_is_forgotten_and_kept(tmp_path: Path):
    journal = Journal(tmp_path / "j.jsonl")
    with journal.writing(print):
        journal.keep(("a", 0), {})
        assert journal.set_aside("x") == 1
        assert ("a", 0) not in journal
        journal.keep(("b", 0), {})
    assert ("a", 0) not in Journal(journal.path) and ("b", 0) in Journal(journal.path)
    assert (tmp_path / "j.x.old").read_text().startswith('{"question": "a"')


def _write(path: Path, began: multiprocessing.Event) -> None:
    journal = Journal(path)
    with journal.writing(print):
        began.set()
        time.sleep(0.5)
        journal.keep(("a", 0), {"mass": 1})


def test_another_run_waits_and_then_finds_the_answers(tmp_path: Path):
    path, began = tmp_path / "j.jsonl", multiprocessing.get_context("spawn").Event()
    other = multiprocessing.get_context("spawn").Process(target=_write, args=(path, began))
    other.start()
    said: list[str] = []
    mine = Journal(path)
    began.wait()
    with mine.writing(said.append):
        assert mine["a", 0] == {"mass": 1}
    assert said == ["another run is adding to j.jsonl: waiting for it"]
    other.join()


def test_two_voters_of_one_process_may_share_a_journal(tmp_path: Path):
    one, two = Journal(tmp_path / "j.jsonl"), Journal(tmp_path / "j.jsonl")
    with one.writing(print), two.writing(print):
        one.keep(("a", 0), {})
        two.keep(("b", 0), {})
    assert all(key in Journal(one.path) for key in (("a", 0), ("b", 0)))


def test_a_broken_line_is_named_and_the_journal_is_free_again(tmp_path: Path):
    path = tmp_path / "j.jsonl"
    journal = Journal(path)
    path.write_text("{broken\n")
    for _ in range(2):
        with pytest.raises(DataError, match=r"broken JSON line: .*j\.jsonl:1"), journal.writing(print):
            pytest.fail("it was opened")
