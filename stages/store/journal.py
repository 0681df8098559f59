"""Append-only journals of model answers (votes, evaluations), one JSON line each.

Answers survive a kill, and no model is asked again for an answer that is in its journal. A line has a digest
of its content, so that an answer that was edited is left out and asked again. Lines of earlier versions have
none, and are believed as long as no line before them has one.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import count
from pathlib import Path
from typing import Any

from pydantic import BaseModel, NonNegativeInt, ValidationError, create_model

from stages.errors import ArtifactError, OutputError, validation_messages
from stages.records import parse_jsonl

log = logging.getLogger(__name__)

SEAL = "seal"
Question = tuple[str, int]
"""Digest of the question, and the index of the answer where a question is asked several times."""


class Journal:
    """Answers of one voter or one evaluated model, in a file whose name identifies the model.

    Several runs may share a journal. One writes at a time; the next waits, and then reads the new answers.
    """

    def __init__(self, path: Path, schema: type[BaseModel]) -> None:
        """schema: model of an answer; ArtifactError for a line of the file that does not fit it."""
        self.path = path
        self._schema = schema
        self._line = create_model("Line", __base__=schema, question=(str, ...), sample=(NonNegativeInt, ...))
        self.notes: dict[str, Any] = {}
        """Values about the journal itself, by name."""
        self._answers: dict[Question, dict[str, Any]] = {}
        self._file: Any = None
        self._inode: int | None = None
        self._reset()
        self._read()

    def __contains__(self, question: Question) -> bool:
        return question in self._answers

    def __getitem__(self, question: Question) -> dict[str, Any]:
        return self._answers[question]

    def get(self, question: Question) -> dict[str, Any] | None:
        return self._answers.get(question)

    @contextmanager
    def writing(self, say: Callable[[str], None]) -> Iterator[None]:
        """Lock the journal for writing and read the answers that other processes have added.

        OutputError if the journal cannot be written.
        """
        from filelock import FileLock, Timeout

        # The lock belongs to the open file, so it also excludes other threads of this process.
        lock = FileLock(self.path.with_name(f".{self.path.name}.lock"), thread_local=False)
        with ExitStack() as stack:
            stack.callback(lock.release)
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                try:
                    lock.acquire(timeout=0)
                except Timeout:
                    say(f"another process is writing to {self.path.name}: waiting")
                    lock.acquire()
                self._open()
            except OSError as error:
                raise OutputError(f"cannot write {self.path}: {error.strerror}") from None
            stack.callback(lambda: self._file.close())  # `set_aside` opens another one
            stack.callback(lambda: os.fsync(self._file.fileno()))
            yield

    def add(self, question: Question, answer: dict[str, Any]) -> None:
        """Append an answer. After this call a kill cannot lose it, but a power failure still can."""
        digest, sample = question
        self._schema.model_validate(answer)
        self._append({"question": digest, "sample": sample, **answer})
        self._answers[question] = answer

    def note(self, name: str, value: Any) -> None:
        self._append({"note": name, "value": value})
        self.notes[name] = value

    def set_aside(self) -> int:
        """Rename the file and start a new one, within `writing`.

        Returns the number of answers in the old file.
        """
        number = len(self._answers)
        names = (self.path.with_suffix(f".{n}.old") for n in count(1))
        self.path.replace(next(name for name in names if not name.exists()))
        with self._file:
            self._open()
        return number

    def _open(self) -> None:
        """Read what other processes wrote, and cut off an unfinished last line of a killed process."""
        self._read()
        self._file = self.path.open("ab", buffering=0)
        os.truncate(self.path, self._offset)
        self._inode = os.fstat(self._file.fileno()).st_ino

    def _append(self, row: dict[str, Any]) -> None:
        line = (json.dumps({**row, SEAL: _digest(row)}, ensure_ascii=False) + "\n").encode()
        # One unbuffered write: a kill leaves a complete line, or an unfinished one that `_open` cuts off.
        if self._file.write(line) < len(line):
            # The disk is full. Remove the half line, so that no later line is appended to it.
            os.truncate(self.path, self._offset)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
        self._offset += len(line)
        self._line_count += 1
        self._sealed = True

    def _reset(self) -> None:
        """Forget everything; the next read starts at the beginning of the file."""
        self.notes.clear()
        self._answers.clear()
        # Bytes and lines of the file `_inode` that are in memory. Both end behind a complete line.
        self._offset = self._line_count = 0
        self._inode = None
        self._sealed = False  # true behind the first line that has a seal

    def _read(self) -> None:
        """Read the complete lines added since the last read; the last answer to a question counts.

        A line whose seal is wrong, or missing after one that has a seal, is dropped.
        """
        status = self.path.stat() if self.path.exists() else None
        if status is None or status.st_ino != self._inode or status.st_size < self._offset:
            self._reset()  # another process has set the old file aside
        if status is None:
            return
        with self.path.open("rb") as file:
            file.seek(self._offset)
            text = file.read()
        # An unfinished last line, which another process may be writing, is left for the next read.
        complete = text[: text.rfind(b"\n") + 1]
        changed = 0
        for number, row in parse_jsonl(complete.split(b"\n"), self.path, self._line_count + 1):
            seal = row.pop(SEAL, None)
            self._sealed |= seal is not None
            if self._sealed and seal != _digest(row):
                changed += 1
                continue
            if "note" in row:
                self.notes[row["note"]] = row.get("value")
                continue
            try:
                line: Any = self._line.model_validate(row)
            except ValidationError as error:
                raise ArtifactError(
                    f"{self.path}:{number} is not a valid answer: {validation_messages(error)[0]}",
                    "move the file away, and the same command asks again",
                ) from None
            del row["question"], row["sample"]
            self._answers[line.question, line.sample] = row
        if changed:
            log.warning("%s: %d lines were changed since they were written: left out", self.path, changed)
        self._offset += len(complete)
        self._line_count += complete.count(b"\n")
        self._inode = status.st_ino


def _digest(row: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(row, sort_keys=True).encode()).hexdigest()[:16]
