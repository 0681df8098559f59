"""The errors a person can cause or meet, each with its exit code.

Messages are lower case, have no full stop, and name the setting as typed and the value seen. `hint` is one
line with the next command or the choices. Exit codes follow sysexits.h, except for 79, which is lorapar's
own. What else is raised, `lorapar_cli.errors` turns into one of them; 70 is a defect of lorapar.
"""

from typing import Any


class Ended(SystemExit):
    """A signal told this process to end, and it unwinds."""


class LoraparError(Exception):
    """Base of the errors shown to a person as one `error:` line and one `hint:` line."""

    exit_code = 70

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint


class DataError(LoraparError):
    """The data exists but is wrong: a broken line, a missing field, a duplicate id, a row too long."""

    exit_code = 65


class MissingInputError(LoraparError):
    """A file, a folder or the artifact of an earlier stage does not exist."""

    exit_code = 66


class ServerError(LoraparError):
    """A server does not start or answer, or a step of training does not end. The same command resumes."""

    exit_code = 69


class OutputError(LoraparError):
    """The output cannot be created."""

    exit_code = 73


class OutOfMemoryError(LoraparError):
    """The memory of the device or the machine ran out. The same command resumes."""

    exit_code = 74


class BusyError(LoraparError):
    """Another process makes the same artifact."""

    exit_code = 75


class AnswerError(LoraparError):
    """A model or a server answers, but the answers cannot be used."""

    exit_code = 76


class SandboxError(LoraparError):
    """No sandbox works on this machine, so code that a model wrote is not run."""

    exit_code = 77


class ConfigError(LoraparError):
    """A setting is unknown, has the wrong type, or does not fit the model or the data."""

    exit_code = 78


class ArtifactError(LoraparError):
    """An artifact is damaged, is not what its key says, or does not fit the others."""

    exit_code = 78


class MeaninglessError(LoraparError):
    """The numbers show that going on is pointless: importance all zero, no active element, no step."""

    exit_code = 79


def lacks_memory(error: BaseException) -> bool:
    """Whether memory ran out: Python's, the device's, or that of torch's allocator on the CPU."""
    names = {kind.__name__ for kind in type(error).__mro__}  # by name, because torch may not be loaded
    return bool(names & {"MemoryError", "OutOfMemoryError"}) or "can't allocate memory" in str(error)


def faults(error: Any) -> list[str]:
    """What a pydantic ValidationError has found, each as `place: what is wrong`."""
    found = []
    for one in error.errors():
        parts = [".".join(map(str, one["loc"])), one["msg"].removeprefix("Value error, ")]
        found.append(": ".join(part for part in parts if part))
    return found


def panicked(error: BaseException) -> bool:
    """Whether a library in Rust has given up, with an exception that is no Exception."""
    return type(error).__name__ == "PanicException"


def first_line(error: BaseException) -> str:
    """The first line of a library's error that says anything, or else its kind."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
