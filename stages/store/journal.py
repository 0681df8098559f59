"""Answers that survive a kill, one JSON line each, and are never asked for again: votes and evaluations."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from stages.records import parse_jsonl

Question = tuple[str, int]
"""Digest of the question, and the number of the answer where a question is asked several times."""


class Journal:
    """The answers of one voter or one evaluated model, in a file whose name identifies it.

    Several runs may share a journal. One writes at a time; the next waits, and then finds the new answers.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.notes: dict[str, Any] = {}
        """Notes about the journal as a whole."""
        self._answers: dict[Question, dict[str, Any]] = {}
        self._read_to = 0
        self._file: Any = None
        self._read()

    def __contains__(self, question: Question) -> bool:
        return question in self._answers

    def __getitem__(self, question: Question) -> dict[str, Any]:
        return self._answers[question]

    def get(self, question: Question) -> dict[str, Any] | None:
        return self._answers.get(question)

    def values(self) -> Iterable[dict[str, Any]]:
        return self._answers.values()

    @contextmanager
    def writing(self, say: Callable[[str], None]) -> Iterator[None]:
        """Within this context no other process adds answers, and all that others added before are known."""
        from filelock import FileLock, Timeout

        self.path.parent.mkdir(parents=True, exist_ok=True)
        # Two voters of one process may differ in their questions alone; then they share a file and this lock.
        lock = FileLock(self.path.with_name(f".{self.path.name}.lock"), is_singleton=True, thread_local=False)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            say(f"another run is adding to {self.path.name}: waiting for it")
            lock.acquire()
        try:
            self._open()
            try:
                yield
            finally:
                os.fsync(self._file.fileno())
                self._file.close()
        finally:
            lock.release()

    def keep(self, question: Question, answer: dict[str, Any]) -> None:
        """Write an answer. When this returns, a kill cannot lose it, but a power failure still can."""
        digest, sample = question
        self._append({"question": digest, "sample": sample, **answer})
        self._answers[question] = answer

    def note(self, name: str, value: Any) -> None:
        self._append({"note": name, "value": value})
        self.notes[name] = value

    def set_aside(self, mark: str) -> int:
        """Within `writing`: rename the file and begin a new one; returns the number of answers set aside."""
        number = len(self._answers)
        self._file.close()
        self.path.replace(self.path.with_suffix(f".{mark}.old"))
        self._answers.clear()
        self.notes.clear()
        self._read_to = 0
        self._open()
        return number

    def _open(self) -> None:
        """Read what others wrote, and cut off the last line if a killed process left it unfinished."""
        self._read()
        if self.path.exists():
            os.truncate(self.path, self._read_to)
        self._file = self.path.open("ab", buffering=0)

    def _append(self, row: dict[str, Any]) -> None:
        line = (json.dumps(row, ensure_ascii=False) + "\n").encode()
        self._file.write(line)  # one write: a kill leaves a whole line or an unfinished one
        self._read_to += len(line)

    def _read(self) -> None:
        """Read the whole lines added since the last time. A second answer to a question changes nothing."""
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            file.seek(self._read_to)
            text = file.read()
        whole = text[: text.rfind(b"\n") + 1]
        for _, row in parse_jsonl(whole.split(b"\n"), self.path):
            if "note" in row:
                self.notes.setdefault(row["note"], row["value"])
            else:
                answer = {name: value for name, value in row.items() if name not in ("question", "sample")}
                self._answers.setdefault((row["question"], row["sample"]), answer)
        self._read_to += len(whole)
