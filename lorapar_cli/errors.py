"""Turns any exception into an error for the user: one sentence, a hint and a documented exit code."""

import errno
import os
import re
import sys
import tempfile
import traceback

from lorapar_cli import options, terminal
from stages.errors import (
    ConfigError,
    LoraparError,
    MissingInputError,
    OutOfMemoryError,
    OutputError,
    ServerError,
    is_out_of_memory,
)

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
FORBIDDEN = {errno.EACCES, errno.EPERM, errno.EROFS}
BAD_PATH = {errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL, errno.EISDIR, errno.ENOTDIR}
NETWORK = ("httpx", "httpcore")
"""Libraries of which every exception is a network error."""
MAX_SHOWN = 200
"""Characters of a path or a library's message that are shown."""
RESUME = "nothing that is finished is lost: the same command resumes"


def report_failure(problem: BaseException) -> int:
    """Print an exception as an `error:` line and a `hint:` line; returns the exit code."""
    error = to_user_error(problem)
    terminal.error(error, options.typed_config)
    return error.exit_code


def to_user_error(error: BaseException) -> LoraparError:
    """Convert an exception to a LoraparError; one that is a LoraparError is returned as it is."""
    if isinstance(error, LoraparError):
        return error
    number = _errno(error)
    if is_out_of_memory(error) or number == errno.ENOMEM:
        return OutOfMemoryError("the machine ran out of memory", RESUME)
    if isinstance(error, ConnectionError) or type(error).__module__.partition(".")[0] in NETWORK:
        return ServerError(
            f"network or server failure: {type(error).__name__} {_one_line(error)}".strip(), RESUME
        )
    if number is not None:
        return _system_error(error, number)
    if isinstance(error, RecursionError):
        return ConfigError(
            "something is nested too deeply to be read: a config, a row or a file of the model"
        )
    return _defect(error)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:MAX_SHOWN]


def _errno(error: BaseException) -> int | None:
    """Return the operating system's error number; native libraries put it into the text of the message."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    match = re.search(r"\(os error (\d+)\)|\[Errno (\d+)\]", str(error))
    if match:
        return int(match[1] or match[2])
    return errno.ENOSPC if "No space left on device" in str(error) else None


def _system_error(error: BaseException, number: int) -> LoraparError:
    """Convert an error of the operating system, with the path that it names."""
    name = getattr(error, "filename", None)
    reason = os.strerror(number).lower()
    if name is None and not isinstance(error, OSError):  # the library's message may name the path
        reason += f" ({_one_line(error)})"
    where = f" {name if len(name) < MAX_SHOWN else name[:MAX_SHOWN] + '…'}" if isinstance(name, str) else ""
    if number in FULL:
        return OutputError(f"cannot write{where}: {reason}", f"free some space; {RESUME}")
    if number in FORBIDDEN:
        return OutputError(
            f"cannot open{where}: {reason}", "check the permissions of runs_dir, or of the path named here"
        )
    if number == errno.ENOENT:
        return MissingInputError(f"no file{where}: {reason}")
    unusable = f"cannot use{where or ' a file'}: {reason}"
    return ConfigError(unusable) if number in BAD_PATH else OutputError(unusable, RESUME)


def _defect(error: BaseException) -> LoraparError:
    """Report a bug in lorapar, and write the traceback to a file."""
    trace = "".join(traceback.format_exception(error))
    try:
        with tempfile.NamedTemporaryFile(
            "w", prefix="lorapar-trace-", suffix=".txt", delete=False, encoding="utf-8", errors="replace"
        ) as file:
            file.write(f"{' '.join(sys.argv)}\n\n{trace}")
        hint = f"please report it with {file.name}, the config, and what `lorapar doctor` says"
    except OSError:
        sys.stderr.write(trace)
        hint = "please report it with the trace above, the config, and what `lorapar doctor` says"
    return LoraparError(f"this is a defect of lorapar: {type(error).__name__}: {_one_line(error)}", hint)
