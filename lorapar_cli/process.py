"""Sets up a process of lorapar: its streams, logs, the environment of libraries, and signals."""

import logging
import os
import signal
import sys
import threading
from io import TextIOWrapper
from types import FrameType
from typing import Any

from lorapar_cli import terminal
from stages.errors import Terminated
from stages.runtime import resources

AGAIN_S = 0.05
"""Seconds until a lost signal is sent again, by when the code that lost it is over."""
SILENCED_LOGGERS = ("bitsandbytes", "vllm.triton_utils", "transformers.trainer_utils")
"""Libraries whose warnings at startup are not actionable, such as that a CPU has no Triton."""

received: list[int] = []
"""Termination signals that this process has got, until it ends."""


class _Received(Terminated):
    """A signal's exception, which lives until the process ends, unless a library or Python swallows it."""

    def __del__(self) -> None:
        if received:
            _send_again(received.pop())


def end_on_signal(number: int, _: FrameType | None) -> None:
    """Raise Terminated, so that `finally` blocks stop servers and delete temporary files, as on Ctrl-C."""
    if not received:  # guards send a second one, which would interrupt that
        received.append(number)
        raise _Received(128 + number)


def _send_again(number: int) -> None:
    timer = threading.Timer(AGAIN_S, os.kill, (os.getpid(), number))
    timer.daemon = True  # a process that ends anyway does not wait for it
    timer.start()


def _unraisable(dropped: Any) -> None:
    """Send Ctrl-C again whose exception Python has dropped, as it does in `__del__` and some callbacks."""
    if isinstance(dropped.exc_value, KeyboardInterrupt):
        _send_again(signal.SIGINT)
    elif not isinstance(dropped.exc_value, Terminated):  # which sends its signal again by itself
        sys.__unraisablehook__(dropped)


def set_up() -> None:
    """Set up streams, logs, the environment of libraries and the handling of signals."""
    if sys.stderr is None:  # closed: else the next file would be opened as stderr
        sys.stderr = open(os.devnull, "w", encoding="utf-8")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # not every terminal has every character
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[terminal.LogHandler()])
    logging.raiseExceptions = False  # stderr on a full disk is no reason for a traceback
    logging.getLogger("stages").setLevel(logging.INFO)
    for name in SILENCED_LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    logging.getLogger("huggingface_hub").propagate = False  # it prints its messages itself
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    resources.tame_libraries()
    if not sys.stderr.isatty():  # each update of a progress bar would be a line of the log
        for name in terminal.NO_PROGRESS_BARS:
            os.environ.setdefault(name, "1")
    # Child processes must not import, for instance, a user's `datasets.py` from the current folder.
    os.environ.setdefault("PYTHONSAFEPATH", "1")
    sys.unraisablehook = _unraisable
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_DFL:  # nohup ignores SIGHUP: leave that
            signal.signal(number, end_on_signal)
