"""The errors a person can cause or meet, each with its exit code.

Message style: lower case, no full stop, the setting as typed and the value seen; `hint` is one line with the next command
or the choices. Exit codes follow sysexits.h; 79 is ours. Anything that is not a `LoraparError` is a bug and keeps its
traceback.
"""


class LoraparError(Exception):
    """Base of the errors shown to a person as one `error:` line and one `hint:` line."""

    exit_code = 70

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint


class DataError(LoraparError):
    """The data is there and wrong: broken line, missing field, duplicate id, too long."""

    exit_code = 65


class MissingInputError(LoraparError):
    """A file, a folder or an earlier stage's artifact is not there."""

    exit_code = 66


class ServerError(LoraparError):
    """A model server does not come up or does not answer; the same command resumes."""

    exit_code = 69


class OutputError(LoraparError):
    """The output cannot be created."""

    exit_code = 73


class OutOfMemoryError(LoraparError):
    """Memory of the device or the machine ran out; the same command resumes."""

    exit_code = 74


class BusyError(LoraparError):
    """Another process holds the stage, or a port."""

    exit_code = 75


class AnswerError(LoraparError):
    """A server answers, but with something that cannot be used."""

    exit_code = 76


class SandboxError(LoraparError):
    """No sandbox works here, so code that a model wrote is not run."""

    exit_code = 77


class ConfigError(LoraparError):
    """A setting is unknown, has the wrong type, or does not fit the model or the data."""

    exit_code = 78


class ArtifactError(LoraparError):
    """An artifact is damaged, foreign or does not fit the others."""

    exit_code = 78


class MeaninglessError(LoraparError):
    """The numbers say that going on is pointless: all-zero importance, no active element, no training step."""

    exit_code = 79
