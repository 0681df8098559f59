"""The store: artifacts that are whole or not there, and journals of answers that runs share."""

import hashlib
import json
import multiprocessing
import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest.mock import Mock

import pytest
from pydantic import BaseModel

from stages.errors import ArtifactError, BusyError, DataError, OutputError
from stages.store import artifacts
from stages.store.artifacts import MANIFEST, Store
from stages.store.digests import DigestCache, key_of
from stages.store.journal import SEAL, Journal, seal_of

PROVENANCE = {"config": {}, "seconds": 2.5, "finished": "2026-11-29T00:00:00+00:00", "versions": {}}
FIELDS = {"variant": "", "inputs": {}, "summary": {}, "provenance": PROVENANCE}


@pytest.fixture
def store(tmp_path) -> Store:
    return Store(tmp_path / "run")


def build(store: Store, name: str = "k", text: str = "payload") -> Path:
    identity = {"name": name}
    key = key_of(identity)
    partial = store.start_partial("score", key)
    (partial / "sub").mkdir()
    (partial / "sub/file.bin").write_text(text)
    (partial / "sub/file.bin").chmod(0o600)  # as some libraries do
    return store.commit("score", key, {"identity": identity, **FIELDS}).path


def test_an_artifact_has_its_name_when_all_of_it_is_on_disk(store, monkeypatch):
    """The files first, then the manifest, then the rename: a power failure may come between them."""
    done = []
    rename = Path.rename
    monkeypatch.setattr(artifacts, "fsync", lambda path: done.append(path.name))
    monkeypatch.setattr(Path, "rename", lambda path, to: done.append(f"to {to.name}") or rename(path, to))
    path = build(store)
    key = path.name
    assert done == ["file.bin", MANIFEST, "sub", f".{key}.partial", f"to {key}", "score"]


def flip(path: Path) -> None:
    path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])


@pytest.mark.parametrize(
    ("harm", "error"),
    [
        (lambda path: None, None),
        (lambda path: flip(path / "sub/file.bin"), "sha256 of {}/sub/file.bin differs from its manifest"),
        (lambda path: (path / "sub/file.bin").unlink(), "{}/sub/file.bin is missing"),
        (lambda path: (path / "more").symlink_to(path / "sub"), "{}/more is not in its manifest"),
        (lambda path: (path / "sub/more.txt").write_text("x"), "{}/sub/more.txt is not in its manifest"),
        # An editor's hidden files do no harm.
        (lambda path: (path / "sub/.more.txt.swp").write_text("x"), None),
        (lambda path: (path / ".ipynb_checkpoints").mkdir(), None),
    ],
)
def test_what_changed_in_an_artifact_is_seen(store, harm, error):
    path = build(store)
    assert not store.partial("score", path.name).exists()
    harm(path)
    assert store.integrity_error(store.load(path)) == (error and error.format(path))


def test_a_rebuild_keeps_the_old_version_aside(store):
    build(store, text="old")
    path = build(store, text="new")
    assert (path / "sub/file.bin").read_text() == "new"
    assert (path.with_name(f"{path.name}.old-1") / "sub/file.bin").read_text() == "old"
    with pytest.raises(ArtifactError, match="its manifest is not that of key other"):
        store.load(path.rename(path.with_name("other")))


def _hold(root: Path, held, release) -> None:
    with Store(root).lock("score", "k"):
        held.set()
        release.wait()


def test_a_second_process_is_told_who_holds_the_stage_and_a_kill_frees_it(store):
    context = multiprocessing.get_context("spawn")
    held, release = context.Event(), context.Event()
    holder = context.Process(target=_hold, args=(store.root, held, release), daemon=True)
    holder.start()
    assert held.wait(600)
    with pytest.raises(BusyError, match=f"being built by pid {holder.pid}"), store.lock("score", "k"):
        pass
    holder.kill()
    holder.join()
    with store.lock("score", "k"):
        pass
    (store.root / "file").write_text("")
    with pytest.raises(OutputError, match="cannot write to"), Store(store.root / "file").lock("score", "k"):
        pass


@pytest.mark.parametrize("before", ["{}", "[]", '{"a": [1, 2]}', "{", "[" * 5000])
def test_digest_cache_follows_content_and_may_be_damaged(tmp_path, before):
    model, file, full = tmp_path / "m", tmp_path / "cache.json", tmp_path / "full"
    (full / "cache.json").mkdir(parents=True)  # no file can be moved there
    file.write_text(before)
    model.mkdir()
    (model / "a").write_text("0")
    cache = DigestCache(file)
    digest = cache.folder(model)
    assert digest == DigestCache(file).folder(model) == DigestCache(full / "cache.json").folder(model)
    assert [path.name for path in full.iterdir()] == ["cache.json"]
    assert cache.file(model / "a") == hashlib.sha256(b"0").hexdigest()
    (model / "a").write_text("2")
    os.utime(model / "a", ns=(1, 1))
    assert cache.folder(model) != digest


@pytest.mark.parametrize(
    ("change", "seal", "reason"),
    [
        (lambda m: m["summary"].update(accuracy=1), False, "was changed after it was written"),
        (lambda m: m.pop("seal"), False, "is not what a stage writes: 'seal'"),
        (lambda m: m.update(schema=1), True, "has schema 1, not 2"),
        (lambda m: m["files"].update({"../x": m["files"].popitem()[1]}), True, "leads out of the artifact"),
        (lambda m: m["files"].update({"/x": m["files"].popitem()[1]}), True, "leads out of the artifact"),
        (lambda m: m.update(identity={"name": "other"}), True, "is not that of key"),
        (lambda m: m.update(key="0" * 12), True, "is not that of key"),
        (lambda m: m["summary"].update(accuracy=float("nan")), True, "Out of range float values"),
    ],
)
def test_an_edited_manifest_is_not_believed(store, change, seal, reason):
    path = build(store)
    manifest = json.loads((path / MANIFEST).read_text())
    change(manifest)
    if seal:
        del manifest["seal"]
        text = json.dumps(manifest, sort_keys=True, separators=(",", ":"))
        manifest["seal"] = hashlib.sha256(text.encode()).hexdigest()
    (path / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError, match=f"{path} is not a lorapar artifact: its manifest .*{reason}"):
        store.load(path)


@pytest.mark.parametrize("text", ["", "[]", "null", '"x"', "[" * 5000, "\xed\xa0\x80"])
def test_what_is_no_manifest_is_not_believed(store, text):
    path = build(store)
    (path / MANIFEST).write_text(text)
    with pytest.raises(ArtifactError, match="is not a lorapar artifact"):
        store.load(path)


def test_files_are_readable_as_the_umask_allows(store):
    before = os.umask(0o022)
    try:
        path = build(store)
    finally:
        os.umask(before)
    assert (path / "sub/file.bin").stat().st_mode & 0o777 == 0o644


def test_a_copied_store_in_which_latest_is_a_folder(store):
    """`cp -rL` follows links: the copy stays, and `latest` is a link again."""
    path, last = build(store), build(store, "l")
    assert store.latest("score", "").path == last
    store.point_latest("score", "", path.name)
    assert store.latest("score", "").path == path
    link = path.with_name("latest")
    link.unlink()
    shutil.copytree(path, link)
    assert store.latest("score", "") is None
    store.point_latest("score", "", path.name)
    assert store.latest("score", "").path == path.resolve() and (path.parent / "latest.old-1").is_dir()


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
