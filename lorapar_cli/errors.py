"""The edge of the program: whatever goes wrong inside becomes one sentence, a hint, and a documented code."""

import errno
import os
import re
import sys
import tempfile
import traceback

from stages.errors import (
    ConfigError,
    LoraparError,
    MissingInputError,
    OutOfMemoryError,
    OutputError,
    ServerError,
    lacks_memory,
)

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
FORBIDDEN = {errno.EACCES, errno.EPERM, errno.EROFS}
UNFIT = {errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL, errno.EISDIR, errno.ENOTDIR}
NETWORK = ("httpx", "httpcore")
"""Libraries all of whose exceptions are of it."""
LONG = 200
"""Characters of a name that are shown."""
AGAIN = "nothing that is finished is lost: the same command goes on"


def to_user_error(error: BaseException) -> LoraparError:
    """What a person is told of an exception that nothing below has turned into a LoraparError."""
    if isinstance(error, LoraparError):
        return error
    if lacks_memory(error):
        return OutOfMemoryError("the machine ran out of memory", AGAIN)
    if isinstance(error, ConnectionError) or type(error).__module__.partition(".")[0] in NETWORK:
        told = " ".join(str(error).split())[:LONG]
        return ServerError(f"the network, or a server: {type(error).__name__} {told}".strip(), AGAIN)
    number = _number(error)
    if number is not None:
        return _of_system(error, number)
    if isinstance(error, RecursionError):
        return ConfigError(
            "something is nested too deeply to be read: a config, a row or a file of the model"
        )
    return _defect(error)


def _number(error: BaseException) -> int | None:
    """The error number of the system; libraries that are not in Python put it into their texts."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    found = re.search(r"\(os error (\d+)\)|\[Errno (\d+)\]", str(error))
    if found:
        return int(found[1] or found[2])
    return errno.ENOSPC if "No space left on device" in str(error) else None


def _of_system(error: BaseException, number: int) -> LoraparError:
    name = getattr(error, "filename", None)
    if name is None and not isinstance(error, OSError):  # its text may say where
        told = " ".join(str(error).split())
        reason = f"{os.strerror(number).lower()} ({told[:LONG]})"
    else:
        reason = os.strerror(number).lower()
    where = f" {name if len(name) < LONG else name[:LONG] + '…'}" if isinstance(name, str) else ""
    if number in FULL:
        return OutputError(f"cannot write{where}: {reason}", f"make room; {AGAIN}")
    if number in FORBIDDEN:
        return OutputError(
            f"cannot open{where}: {reason}", "runs_dir, or the folder that is named, must be yours"
        )
    if number == errno.ENOENT:
        return MissingInputError(f"no file{where}: {reason}")
    if number in UNFIT:
        return ConfigError(f"cannot use{where or ' a file'}: {reason}")
    if number == errno.ENOMEM:
        return OutOfMemoryError("the machine ran out of memory", AGAIN)
    return OutputError(f"cannot use{where or ' a file'}: {reason}", AGAIN)


def _defect(error: BaseException) -> LoraparError:
    """An exception that is nobody's fault but ours; its trace goes into a file."""
    trace = "".join(traceback.format_exception(error))
    told = " ".join(str(error).split())[:200]
    try:
        with tempfile.NamedTemporaryFile(
            "w", prefix="lorapar-trace-", suffix=".txt", delete=False, encoding="utf-8", errors="replace"
        ) as file:
            file.write(f"{' '.join(sys.argv)}\n\n{trace}")
        hint = f"please report it with {file.name}, the config, and what `lorapar doctor` says"
    except OSError:
        sys.stderr.write(trace)
        hint = "please report it with the trace above, the config, and what `lorapar doctor` says"
    return LoraparError(f"this is a defect of lorapar: {type(error).__name__}: {told}", hint)
