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
"""Seconds until a dropped signal is sent again, by when the callback that dropped it is over."""
SILENCED_LOGGERS = ("bitsandbytes", "vllm.triton_utils", "transformers.trainer_utils")
"""Libraries whose warnings at startup are not actionable, such as that a CPU has no Triton."""

received: list[int] = []
"""Termination signals that this process has got."""


def end_on_signal(number: int, _: FrameType | None) -> None:
    """Raise Terminated, so that `finally` blocks stop servers and delete temporary files, as on Ctrl-C."""
    for another in (signal.SIGTERM, signal.SIGHUP):  # guards send a second one, which would interrupt that
        signal.signal(another, signal.SIG_IGN)
    received.append(number)
    raise Terminated(128 + number)


def send_again(unraisable: Any) -> None:
    """Send a signal again whose exception Python has dropped, as it does in `__del__` and some callbacks."""
    error = unraisable.exc_value
    if not isinstance(error, Terminated | KeyboardInterrupt):
        sys.__unraisablehook__(unraisable)
        return
    number = signal.SIGINT
    if isinstance(error, Terminated):
        number = signal.Signals(int(str(error.code)) - 128)
        signal.signal(number, end_on_signal)
    threading.Timer(AGAIN_S, os.kill, (os.getpid(), number)).start()


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
    sys.unraisablehook = send_again
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_DFL:  # nohup ignores SIGHUP: leave that
            signal.signal(number, end_on_signal)
