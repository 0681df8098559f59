"""Answers that survive a kill, one JSON line each, and are never asked for again: votes and evaluations."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field, ValidationError

from stages.errors import ArtifactError, OutputError, faults
from stages.records import parse_jsonl

Question = tuple[str, int]
"""Digest of the question, and the number of the answer where a question is asked several times."""


class _Note(BaseModel):
    note: str
    value: Any


class _Asked(BaseModel):
    question: str
    sample: int = Field(ge=0)


class Journal:
    """The answers of one voter or one evaluated model, in a file whose name identifies it.

    Several runs may share a journal. One writes at a time; the next waits, and then finds the new answers.
    """

    def __init__(self, path: Path, shape: type[BaseModel]) -> None:
        """shape: of an answer; ArtifactError for a line of the file that does not have it."""
        self.path = path
        self._shape = shape
        self.notes: dict[str, Any] = {}
        """Notes about the journal as a whole."""
        self._answers: dict[Question, dict[str, Any]] = {}
        self._file: Any = None
        self._inode: int | None = None
        self._begin()
        self._read()

    def __contains__(self, question: Question) -> bool:
        return question in self._answers

    def __getitem__(self, question: Question) -> dict[str, Any]:
        return self._answers[question]

    def get(self, question: Question) -> dict[str, Any] | None:
        return self._answers.get(question)

    @contextmanager
    def writing(self, say: Callable[[str], None]) -> Iterator[None]:
        """Within this context nobody else adds answers, and all that others added before are known.

        OutputError if the journal cannot be written.
        """
        from filelock import FileLock, Timeout

        # The kernel holds one lock per open file, so it also keeps the threads of this process apart.
        lock = FileLock(self.path.with_name(f".{self.path.name}.lock"), thread_local=False)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            try:
                lock.acquire(timeout=0)
            except Timeout:
                say(f"somebody else is adding to {self.path.name}: waiting")
                lock.acquire()
            self._open()
        except OSError as error:
            lock.release()
            raise OutputError(f"cannot write {self.path}: {error.strerror}") from None
        except BaseException:
            lock.release()
            raise
        try:
            yield
        finally:
            try:
                os.fsync(self._file.fileno())
            finally:
                self._file.close()
                lock.release()

    def keep(self, question: Question, answer: dict[str, Any]) -> None:
        """Write an answer. When this returns, a kill cannot lose it, but a power failure still can."""
        digest, sample = question
        self._shape.model_validate(answer)
        self._append({"question": digest, "sample": sample, **answer})
        self._answers[question] = answer

    def note(self, name: str, value: Any) -> None:
        self._append({"note": name, "value": value})
        self.notes[name] = value

    def set_aside(self) -> int:
        """Rename the file and begin a new one, while writing; returns the number of answers left behind."""
        number = len(self._answers)
        n = 1
        while (aside := self.path.with_suffix(f".{n}.old")).exists():
            n += 1
        self.path.replace(aside)
        with self._file:
            self._open()
        return number

    def _open(self) -> None:
        """Take in what others wrote, and cut off a last line that a killed process left unfinished."""
        self._read()
        self._file = self.path.open("ab", buffering=0)
        if os.fstat(self._file.fileno()).st_size > self._read_to:
            os.truncate(self.path, self._read_to)
        self._inode = os.fstat(self._file.fileno()).st_ino

    def _append(self, row: dict[str, Any]) -> None:
        line = (json.dumps(row, ensure_ascii=False) + "\n").encode()
        # One write, so that a kill leaves a whole line or an unfinished one.
        if self._file.write(line) < len(line):
            # Half a line must not be followed by another one, should there be room again.
            os.truncate(self.path, self._read_to)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
        self._read_to += len(line)
        self._lines += 1

    def _begin(self) -> None:
        """Know nothing: the file is new."""
        self.notes.clear()
        self._answers.clear()
        self._read_to = self._lines = 0
        self._inode = None

    def _read(self) -> None:
        """Read the whole lines added since then. Of two answers to one question the later counts."""
        found = self.path.stat() if self.path.exists() else None
        if found is None or found.st_ino != self._inode or found.st_size < self._read_to:
            self._begin()  # another process has set the old file aside
        if found is None:
            return
        with self.path.open("rb") as file:
            file.seek(self._read_to)
            text = file.read()
        whole = text[: text.rfind(b"\n") + 1]
        for number, row in parse_jsonl(whole.split(b"\n"), self.path, self._lines + 1):
            try:
                if "note" in row:
                    note = _Note.model_validate(row)
                    self.notes[note.note] = note.value
                    continue
                question = _Asked.model_validate(row)
                answer = {name: value for name, value in row.items() if name not in ("question", "sample")}
                # A text that reads as a number is one from here on.
                answer |= self._shape.model_validate(answer).model_dump(exclude_unset=True)
            except ValidationError as error:
                raise ArtifactError(
                    f"{self.path}:{number} is no answer: {faults(error)[0]}",
                    "move the file away, and the same command asks again",
                ) from None
            self._answers[question.question, question.sample] = answer
        self._read_to += len(whole)
        self._lines += whole.count(b"\n")
        self._inode = found.st_ino
