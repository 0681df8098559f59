"""Commands in forked children, which have everything imported, with a fault at one of their writes."""

import contextlib
import os
import resource
import signal
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

KILLED, LIMIT_S = 137, 120
CALLS = ("rename", "remove", "rmdir", "mkdir", "symlink", "link", "truncate", "chmod")
CHANGES = {f"os.{name}" for name in CALLS}
"""Events of the interpreter (sys.addaudithook) before it changes the file system; and `open`, to write."""


@dataclass(frozen=True)
class Ended:
    code: int | None
    """None if it hung."""
    said: str

    @property
    def traceback(self) -> bool:
        return "Traceback" in self.said or "defect of lorapar" in self.said


def writes(root: Path, act: Callable[[int], None]) -> None:
    """Call `act` with the number of each write below `root`, before it happens, from here on for good."""
    prefix, number = str(root), 0

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal number
        if event == "open":
            flags = arguments[2]
            if not isinstance(flags, int) or not flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC):
                return
        elif event not in CHANGES:
            return
        with contextlib.suppress(TypeError):
            if os.fsdecode(arguments[0]).startswith(prefix):  # type: ignore[arg-type]
                number += 1
                act(number)

    sys.addaudithook(hook)


def killed_at(wanted: int) -> Callable[[int], None]:
    return lambda number: os._exit(KILLED) if number == wanted else None


def failing_from(wanted: int, error: int) -> Callable[[int], None]:
    """From that write on none works, as on a disk that is full or read-only."""

    def act(number: int) -> None:
        if number >= wanted:
            raise OSError(error, os.strerror(error))

    return act


def counting(file: Path) -> Callable[[int], None]:
    return lambda number: file.write_text(str(number), encoding="utf-8")


def small_files(largest: int, kills: bool) -> None:
    """No file may be longer, whoever writes it: libraries in C++ and Rust, too.

    kills: the write that would make it longer ends the process; else it is refused.
    """
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL if kills else signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))


def command(arguments: list[str], before: Callable[[], None] = lambda: None) -> Ended:
    """Run `lorapar ARGUMENTS` in a child, after `before` there."""
    with tempfile.TemporaryFile() as said:
        child = os.fork()
        if child == 0:
            _inside(arguments, before, said.fileno())
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        said.seek(0)
        return Ended(None if code == -signal.SIGALRM else code, said.read().decode(errors="replace"))


def _inside(arguments: list[str], before: Callable[[], None], said: int) -> None:
    code = 99
    signal.alarm(LIMIT_S)
    try:
        os.dup2(said, 1)
        os.dup2(said, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
        sys.argv = ["lorapar", *arguments]
        from lorapar_cli.app import main

        before()
        main()
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 0 if ended.code is None else 1
    except BaseException as error:
        print(f"Traceback of {type(error).__name__}: {error}", file=sys.stderr)
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)
