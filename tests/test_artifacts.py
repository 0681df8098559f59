import hashlib
import json
import multiprocessing
import os
import shutil
from pathlib import Path

import pytest

from stages.errors import ArtifactError, BusyError, OutputError
from stages.store import artifacts
from stages.store.artifacts import MANIFEST, Store
from stages.store.digests import DigestCache, key_of

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
