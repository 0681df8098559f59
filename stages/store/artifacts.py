"""Content-addressed artifact store: `ROOT/<stage>/<key>/manifest.json` and the files that it lists.

A key is a digest of everything that determines a result, computed before the stage runs. An artifact is valid
if its manifest parses, every file has the digest in the manifest, and its inputs have not been rebuilt since.
Nothing is changed in place: a stage builds in `.<key>.partial/`. The manifest is written last, and when it is
on disk the folder is renamed.
"""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path, PurePosixPath
from typing import Any

from stages.errors import ArtifactError, BusyError, OutputError
from stages.store.digests import digest_of, files_in, fsync, is_hidden, key_of, sha256_file

MANIFEST = "manifest.json"
SCHEMA = 2
"""Version of what a manifest has."""
CHECKSUM = "seal"
"""Field of a manifest with the digest of the others."""
MOVE_AWAY_HINT = "move it away and run the stage again"


@dataclass(frozen=True)
class Artifact:
    """Committed folder with its manifest."""

    path: Path
    manifest: dict[str, Any]

    @property
    def digest(self) -> str:
        """sha256 over the names and digests of all files; it distinguishes different builds of one key."""
        return digest_of(self.manifest["files"])

    @property
    def has_adapter(self) -> bool:
        return f"{self.adapter.name}/adapter_config.json" in self.manifest["files"]

    @property
    def adapter(self) -> Path:
        """Folder of the adapter, if there is one: the trained one, or the initial one."""
        is_initial = "init/adapter_config.json" in self.manifest["files"]
        return self.path / ("init" if is_initial else "adapter")


def make_readable(folder: Path) -> None:
    """Give all files the folder's read and write permissions: safetensors writes for their owner only."""
    mode = 0o666 & folder.stat().st_mode  # the folder's mode follows the umask
    for file in folder.rglob("*"):
        if file.is_file() and file.stat().st_mode & 0o666 != mode:
            with suppress(PermissionError):  # some file systems have no modes
                file.chmod(mode)


def refuse_store(target: Path) -> None:
    """Raise OutputError if what is written to `target` would lie in an artifact, or beside one of a stage."""
    target = target.resolve()
    folders = (target, *target.parents, *target.parent.glob("*/"))
    if artifact := next((folder for folder in folders if _is_artifact(folder)), None):
        raise OutputError(
            f"{target} would lie among the artifacts of a run ({artifact})", "name a place elsewhere"
        )


def _is_artifact(folder: Path) -> bool:
    """True if the folder is where an artifact lies, and has a manifest of lorapar's."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        return (manifest["stage"], manifest["key"]) == (folder.parent.name, folder.name)
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return False


class Store:
    def __init__(self, root: Path) -> None:
        self.root = root
        self._integrity_errors: dict[tuple[Path, str], str | None] = {}
        self.states: dict[str, Any] = {}
        """State of each step that has been looked at, by its key (see pipeline/state.py)."""

    def look_again(self) -> None:
        """Forget what was read and verified: another process may have changed it."""
        self.states.clear()
        self._integrity_errors.clear()

    def folder(self, stage: str, key: str) -> Path:
        return self.root / stage / key

    def partial(self, stage: str, key: str) -> Path:
        return self.root / stage / f".{key}.partial"

    def load(self, path: Path) -> Artifact | None:
        """Return the artifact at `path`, or None if there is no such folder.

        ArtifactError if its manifest is invalid.
        """
        if not path.exists():
            return None
        try:
            manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
            reason = _manifest_error(manifest, path.name.split(".")[0])
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:  # ValueError also of NaN
            reason = f"its manifest is not what a stage writes: {error}"
        if reason:
            raise ArtifactError(f"{path} is not a lorapar artifact: {reason}", MOVE_AWAY_HINT)
        return Artifact(path, manifest)

    def integrity_error(self, artifact: Artifact) -> str | None:
        """The first difference from the manifest, or None; read once, because steps share their inputs.

        Hidden files, such as an editor's, may be added. Every byte of the others is read, because safetensors
        does not notice a flipped bit.
        """
        build = (artifact.path, artifact.digest)
        if build not in self._integrity_errors:
            self._integrity_errors[build] = next(_differences(artifact), None)
        return self._integrity_errors[build]

    def latest(self, stage: str, variant: str) -> Artifact | None:
        """Artifact of the last successful command for this stage and variant, by a link made for people.

        Stages never read it.
        """
        link = self._latest_link(stage, variant)
        return self.load(link.resolve()) if link.is_symlink() and link.exists() else None

    def point_latest(self, stage: str, variant: str, key: str) -> None:
        link = self._latest_link(stage, variant)
        with suppress(OSError):  # there are file systems without links
            if link.is_symlink() and os.readlink(link) == key:
                return
            if link.is_dir() and not link.is_symlink():  # the run was copied by a tool that follows links
                link.rename(_unused_name(link))
            temporary = link.with_name(f".{link.name}.{os.getpid()}")
            temporary.unlink(missing_ok=True)
            temporary.symlink_to(key)
            os.replace(temporary, link)

    def _latest_link(self, stage: str, variant: str) -> Path:
        return self.root / stage / (f"latest-{variant}" if variant else "latest")

    @contextmanager
    def lock(self, stage: str, key: str) -> Iterator[None]:
        """Lock this stage and key while the context is open; BusyError at once if another process has it.

        The kernel releases the lock when the process ends for any reason.
        """
        from filelock import FileLock, Timeout

        folder = self.root / stage
        owner = folder / f".{key}.owner"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = FileLock(folder / f".{key}.lock", timeout=0)
            lock.acquire()
            owner.write_text(f"pid {os.getpid()}", encoding="utf-8")
        except Timeout:
            who = owner.read_text(encoding="utf-8", errors="replace") if owner.exists() else "another process"
            raise BusyError(
                f"{stage} {key} is being built by {who}", "wait for it, then run the same command"
            ) from None
        except (PermissionError, NotADirectoryError, FileExistsError) as error:
            raise OutputError(
                f"cannot write to {folder}: {error.strerror}", "set `runs_dir` to a folder you can write"
            ) from None
        try:
            yield
        finally:
            lock.release()

    def commit(self, stage: str, key: str, manifest: dict[str, Any]) -> Artifact:
        """Turn the partial folder of `key` into the artifact, the latest one.

        `manifest` comes without the file digests.
        An earlier artifact of this key, replaced after a forced run or rebuilt inputs, becomes `<key>.old-N`.
        """
        partial, final = self.partial(stage, key), self.folder(stage, key)
        entries = {}
        make_readable(partial)
        for name, file in files_in(partial).items():
            fsync(file)
            entries[name] = {"size": file.stat().st_size, "sha256": sha256_file(file)}
        complete = {"schema": SCHEMA, "stage": stage, "key": key, **manifest, "files": entries}
        complete = json.loads(json.dumps(complete))  # as it will be read back
        complete[CHECKSUM] = _checksum(complete)
        text = json.dumps(complete, indent=1, ensure_ascii=False)
        (partial / MANIFEST).write_text(text + "\n", encoding="utf-8")
        fsync(partial / MANIFEST)
        for folder in [*(p for p in partial.rglob("*") if p.is_dir()), partial]:
            fsync(folder)
        if final.exists():
            final.rename(_unused_name(final))
        partial.rename(final)
        fsync(final.parent)
        self.states.clear()
        self.point_latest(stage, manifest["variant"], key)
        return Artifact(final, complete)

    def start_partial(self, stage: str, key: str) -> Path:
        """Create the empty folder in which a stage builds; leftovers of a killed run are deleted."""
        partial = self.partial(stage, key)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        return partial


def _manifest_error(manifest: Any, key: str) -> str | None:
    """Say why this is not the manifest that a stage wrote under the key; None if it is."""
    if manifest["schema"] != SCHEMA:
        return f"its manifest has schema {manifest['schema']}, not {SCHEMA}"
    if manifest["key"] != key or key_of(manifest["identity"]) != key:
        return f"its manifest is not that of key {key}"
    if manifest[CHECKSUM] != _checksum(manifest):
        return "its manifest was changed after it was written"
    outside = (
        path for path in map(PurePosixPath, manifest["files"]) if path.is_absolute() or ".." in path.parts
    )
    if path := next(outside, None):
        return f"its manifest names {path}, which leads out of the artifact"
    return None


def _checksum(manifest: dict[str, Any]) -> str:
    return digest_of({name: value for name, value in manifest.items() if name != CHECKSUM})


def _differences(artifact: Artifact) -> Iterator[str]:
    """Differences between the files of an artifact and its manifest."""
    listed = artifact.manifest["files"]
    for name, entry in listed.items():
        file = artifact.path / name
        if not file.is_file():
            yield f"{file} is missing"
        elif file.stat().st_size != entry["size"] or sha256_file(file) != entry["sha256"]:
            yield f"sha256 of {file} differs from its manifest"
    for file in artifact.path.rglob("*"):
        name = file.relative_to(artifact.path).as_posix()
        is_folder = file.is_dir() and not file.is_symlink()
        if not is_folder and name not in {*listed, MANIFEST} and not is_hidden(name):
            yield f"{file} is not in its manifest"


def _unused_name(path: Path) -> Path:
    return next(aside for n in count(1) if not (aside := path.with_name(f"{path.name}.old-{n}")).exists())
