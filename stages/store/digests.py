"""Digests of values, files and folders, by which they are identified."""

import contextlib
import hashlib
import json
import os
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

KEY_DIGITS = 12


def canonical(value: Any) -> bytes:
    """The one JSON text of a value: sorted keys, no spaces, no NaN."""
    return json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False
    ).encode()


def key_of(identity: dict[str, Any]) -> str:
    return hashlib.sha256(canonical(identity)).hexdigest()[:KEY_DIGITS]


def id_of(content: Any) -> str:
    """16 hexadecimal digits of what a row says."""
    return hashlib.sha256(canonical(content)).hexdigest()[:16]


def seed_of(identity: dict[str, Any]) -> int:
    """A seed that follows from a value, in 31 bits."""
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


Known = tuple[int, int, int, str]
"""Size, modification time and inode of a file, and its sha256."""
KNOWN = TypeAdapter(dict[str, Known])


class DigestCache:
    """sha256 of large files, kept with size, modification time and inode, so that a model is read once."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._known: dict[str, Known] = {}
        with contextlib.suppress(OSError, ValueError, RecursionError):  # it is only a cache
            self._known = KNOWN.validate_json(path.read_text(encoding="utf-8"))

    def file(self, path: Path) -> str:
        state = path.stat()
        mark = (state.st_size, state.st_mtime_ns, state.st_ino)
        name = str(path.resolve())
        if name in self._known and self._known[name][:3] == mark:
            return self._known[name][3]
        digest = sha256_file(path)
        self._known[name] = (*mark, digest)
        self._save()
        return digest

    def folder(self, path: Path) -> str:
        """One digest of the relative names and contents of all files below `path`, except hidden ones."""
        digests = []
        for file in sorted(path.rglob("*")):
            name = file.relative_to(path)
            hidden = any(part.startswith(".") for part in name.parts)
            if file.is_file() and not hidden:
                digests.append([name.as_posix(), self.file(file)])
        return hashlib.sha256(canonical(digests)).hexdigest()

    def _save(self) -> None:
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            temporary = self._path.with_name(f"{self._path.name}.{os.getpid()}")
            temporary.write_text(json.dumps(self._known), encoding="utf-8")
            os.replace(temporary, self._path)
        except OSError:
            pass  # it is only a cache: next time the digest is computed again
