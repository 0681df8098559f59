"""Digests that identify values, files and folders."""

import contextlib
import hashlib
import json
import os
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from stages.store.whole_files import whole_files


def digest_of(value: Any) -> str:
    """sha256 of a value as canonical JSON: sorted keys, no spaces, no NaN."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def key_of(identity: dict[str, Any]) -> str:
    return digest_of(identity)[:12]


def id_of(content: Any) -> str:
    """16 hexadecimal digits that identify a row by its content."""
    return digest_of(content)[:16]


def seed_of(identity: dict[str, Any]) -> int:
    """31-bit seed derived from a value."""
    return int(key_of(identity), 16) % 2**31


def sha256_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_hidden(name: str) -> bool:
    """True if a relative path is that of a hidden file, or of a file in a hidden folder."""
    return any(part.startswith(".") for part in name.split("/"))


def files_in(folder: Path) -> dict[str, Path]:
    """The files in a folder and below it, by their relative paths, without hidden ones."""
    files = (file for file in sorted(folder.rglob("*")) if file.is_file())
    names = {file.relative_to(folder).as_posix(): file for file in files}
    return {name: file for name, file in names.items() if not is_hidden(name)}


CacheEntry = tuple[int, int, int, str]
"""Size, modification time and inode of a file, and its sha256."""
CACHE_FILE = TypeAdapter(dict[str, CacheEntry])


class DigestCache:
    """Cache of the sha256 of files, so that a model is read only once.

    An entry is valid while the file's size, modification time and inode are the same.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._entries: dict[str, CacheEntry] = {}
        with contextlib.suppress(OSError, ValueError, RecursionError):  # it is only a cache
            self._entries = CACHE_FILE.validate_json(path.read_text(encoding="utf-8"))

    def file(self, path: Path) -> str:
        status = path.stat()
        version = (status.st_size, status.st_mtime_ns, status.st_ino)
        name = str(path.resolve())
        if name in self._entries and self._entries[name][:3] == version:
            return self._entries[name][3]
        digest = sha256_file(path)
        self._entries[name] = (*version, digest)
        # It is only a cache: without the file, the next process computes the digest again.
        with contextlib.suppress(OSError), whole_files([self._path], replace=True) as (draft,):
            draft.write_text(json.dumps(self._entries), encoding="utf-8")
        return digest

    def folder(self, path: Path) -> str:
        """Return one digest of the relative paths and contents of a folder's files, without hidden ones."""
        return digest_of([[name, self.file(file)] for name, file in files_in(path).items()])
