"""Journals of model answers (votes, evaluations), in a SQLite file that several runs may share."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from stages.errors import ArtifactError, OutputError, validation_messages

Question = tuple[str, int]
"""Digest of a prompt, and the number of the sample."""
WAIT_S = 3600.0
"""Seconds to wait for another process that writes."""


class Journal:
    """Answers of one voter or one evaluated model, in a file whose name identifies the model."""

    def __init__(self, path: Path, schema: type[BaseModel]) -> None:
        """schema: model of an answer; ArtifactError for one in the file that does not fit it."""
        self.path, self._schema = path, schema
        self._answers: dict[Question, dict[str, Any]] = {}
        self._database: Any = None
        if path.exists():
            with sqlite3.connect(path) as database:
                self._read(database)

    def __contains__(self, question: Question) -> bool:
        return question in self._answers

    def __getitem__(self, question: Question) -> dict[str, Any]:
        return self._answers[question]

    def get(self, question: Question) -> dict[str, Any] | None:
        return self._answers.get(question)

    @contextmanager
    def writing(self, say: Callable[[str], None]) -> Iterator[None]:
        """Lock the journal, so that nothing is asked twice, and read the answers that others have added."""
        from filelock import FileLock, Timeout

        # The lock belongs to the open file, so it also excludes other threads of this process.
        lock = FileLock(self.path.with_name(f".{self.path.name}.lock"), thread_local=False)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            try:
                lock.acquire(timeout=0)
            except Timeout:
                say(f"another process is writing to {self.path.name}: waiting")
                lock.acquire()
            self._database = sqlite3.connect(self.path, timeout=WAIT_S, isolation_level=None)
            self._database.execute("PRAGMA journal_mode = WAL")
            self._database.execute(
                "CREATE TABLE IF NOT EXISTS answers (question, sample, answer, PRIMARY KEY (question, sample))"
            )
            self._read(self._database)
            yield
        except (OSError, sqlite3.OperationalError) as error:
            raise OutputError(f"cannot write {self.path}: {error}") from None
        finally:
            if self._database is not None:
                self._database.close()
            lock.release()

    def add(self, question: Question, answer: dict[str, Any]) -> None:
        """Add an answer. After this call a kill cannot lose it, but a power failure still can."""
        self._schema.model_validate(answer)
        row = (*question, json.dumps(answer, ensure_ascii=False))
        self._database.execute("INSERT OR REPLACE INTO answers VALUES (?, ?, ?)", row)
        self._answers[question] = answer

    def _read(self, database: Any) -> None:
        try:
            if not database.execute("SELECT 1 FROM sqlite_master WHERE name = 'answers'").fetchone():
                return  # another process has just made the file
            for digest, sample, text in database.execute("SELECT * FROM answers"):
                answer = json.loads(text)
                self._schema.model_validate(answer)
                self._answers[digest, sample] = answer
        except (ValidationError, ValueError, sqlite3.DatabaseError) as error:
            reason = validation_messages(error)[0] if isinstance(error, ValidationError) else error
            raise ArtifactError(
                f"{self.path} has an invalid answer: {reason}",
                "move the file away, and the same command asks again",
            ) from None
