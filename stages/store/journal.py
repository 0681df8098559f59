"""Append-only journals of model answers (votes, evaluations), one JSON line each.

Answers survive a kill, and no model is asked again for an answer that is in its journal. A line has a digest
of its content, so that an answer that was edited is left out and asked again.
"""

import errno
import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
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
        self._answers: dict[Question, dict[str, Any]] = {}
        self._file: Any = None
        self._offset = self._line_count = 0
        """Bytes and lines of the file `_inode` that are in memory. Both end behind a complete line."""
        self._inode: int | None = None
        self._read()

    def __contains__(self, question: Question) -> bool:
        return question in self._answers

    def __getitem__(self, question: Question) -> dict[str, Any]:
        return self._answers[question]

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
                self._read()
                self._file = stack.enter_context(self.path.open("ab", buffering=0))
                os.truncate(self.path, self._offset)  # cuts off the unfinished last line of a killed process
            except OSError as error:
                raise OutputError(f"cannot write {self.path}: {error.strerror}") from None
            stack.callback(lambda: os.fsync(self._file.fileno()))
            yield

    def add(self, question: Question, answer: dict[str, Any]) -> None:
        """Append an answer. After this call a kill cannot lose it, but a power failure still can."""
        self._schema.model_validate(answer)
        row = {"question": question[0], "sample": question[1], **answer}
        line = (json.dumps({**row, SEAL: seal_of(row)}, ensure_ascii=False) + "\n").encode()
        # One unbuffered write: a kill leaves a complete line, or an unfinished one that `writing` cuts off.
        if self._file.write(line) < len(line):
            # The disk is full. Remove the half line, so that no later line is appended to it.
            os.truncate(self.path, self._offset)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
        self._offset += len(line)
        self._line_count += 1
        self._answers[question] = answer

    def _read(self) -> None:
        """Read the complete lines added since the last read; the last answer to a question counts."""
        status = self.path.stat() if self.path.exists() else None
        if status is None or status.st_ino != self._inode or status.st_size < self._offset:
            self._answers.clear()  # it is the first read, or somebody has moved the old file away
            self._offset = self._line_count = 0
        if status is None:
            return
        with self.path.open("rb") as file:
            file.seek(self._offset)
            text = file.read()
        # An unfinished last line, which another process may be writing, is left for the next read.
        complete = text[: text.rfind(b"\n") + 1]
        changed = 0
        for number, row in parse_jsonl(complete.split(b"\n"), self.path, self._line_count + 1):
            if row.pop(SEAL, None) != seal_of(row):
                changed += 1
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


def seal_of(row: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(row, sort_keys=True).encode()).hexdigest()[:16]
