"""User-facing errors, each with its exit code.

Messages are lower case, have no full stop, and name the setting as the user typed it and the value. `hint` is
one line with the next command or the choices; the command line puts what was typed in place of CONFIG. Exit
codes follow sysexits.h, except for 79, which is lorapar's own. `lorapar_cli.errors` turns all other
exceptions into one of these; 70 means a bug in lorapar.
"""

from pathlib import Path
from typing import Any

HUB_HINT = "check its name and the network; if it is gated or private: hf auth login"
"""The hint where a model or a data set cannot be had from the hub."""


def sought(path: str | Path) -> str:
    """A path that is not there, with the folder in which it was looked for if it is relative."""
    return str(path) if Path(path).is_absolute() else f"{path} in {Path.cwd()}"


class Terminated(SystemExit):
    """Raised by the handler of a termination signal, so that `finally` blocks run."""


class LoraparError(Exception):
    """Base of the errors that the user sees as one `error:` line and one `hint:` line."""

    exit_code = 70

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint


class DataError(LoraparError):
    """The data exists but is invalid: a broken line, a missing field, a duplicate id, a row too long."""

    exit_code = 65


class MissingInputError(LoraparError):
    """A file, a folder or the artifact of an earlier stage does not exist."""

    exit_code = 66


class ServerError(LoraparError):
    """A server does not start or answer, or a training step hangs. The same command resumes."""

    exit_code = 69


class OutputError(LoraparError):
    """The output cannot be created."""

    exit_code = 73


class OutOfMemoryError(LoraparError):
    """The memory of the device or the machine ran out. The same command resumes."""

    exit_code = 74


class BusyError(LoraparError):
    """Another process is building the same artifact."""

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


class UnusableResult(LoraparError):
    """The results make going on pointless: all importance scores are zero, no active element, no step."""

    exit_code = 79


def is_out_of_memory(error: BaseException) -> bool:
    """True for an out-of-memory error of Python, of the device, or of torch's allocator on the CPU."""
    names = {kind.__name__ for kind in type(error).__mro__}  # by name, because torch may not be loaded
    return bool(names & {"MemoryError", "OutOfMemoryError"}) or "can't allocate memory" in str(error)


def validation_messages(error: Any) -> list[str]:
    """Messages of a pydantic ValidationError, each as `location: message`."""
    messages = []
    for detail in error.errors():
        location = ".".join(map(str, detail["loc"]))
        message = detail["msg"].removeprefix("Value error, ")
        messages.append(": ".join(filter(None, [location, message])))
    return messages


def is_rust_panic(error: BaseException) -> bool:
    """True for a panic of a library in Rust, which is a BaseException and not an Exception."""
    return type(error).__name__ == "PanicException"


def first_line(error: BaseException) -> str:
    """First non-empty line of a library's error message, or the name of its type."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
