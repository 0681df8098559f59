"""The progress of a stage: what its line says on a terminal, how often a log gets one, what stays of it."""

import io
import os
import pty
import re
import subprocess
import sys
import termios
import threading
from types import SimpleNamespace

import pytest
from conftest import ROOT

from lorapar_cli import terminal
from lorapar_cli.live_line import LiveLine
from lorapar_cli.progress import LOG_EVERY_S, Position, TerminalProgress
from stages.errors import ConfigError

PLANNED = {"sft": 60.0, "rl": 200.0, "eval:base@demo": 40.0, "eval:sft@demo": 20.0}


class Screen(io.StringIO):
    """Stderr, as a terminal or as a file."""

    live = True

    def isatty(self) -> bool:
        return self.live

    @property
    def rows(self) -> list[str]:
        """The lines as one sees them in the end, without colors."""
        text = re.sub(r"\x1b\[[\d;]*m", "", self.getvalue())
        return [row.rsplit("\r", 1)[-1].replace("\x1b[K", "") for row in text.split("\n")]


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def screen(monkeypatch):
    found = Screen()
    for module in ("live_line", "terminal"):  # pytest sets sys.stderr itself, after this
        monkeypatch.setattr(f"lorapar_cli.{module}.sys", SimpleNamespace(stderr=found))
    monkeypatch.setattr(terminal, "live_line", LiveLine())
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.delenv("NO_COLOR", raising=False)
    return found


def training(position: Position | None = None, clock: Clock | None = None) -> TerminalProgress:
    """SFT after 6 of 12 steps, which took 30 seconds."""
    clock = clock or Clock()
    progress = TerminalProgress(position, clock)
    progress.begin("sft")
    progress.start("sft on 36 rows", 12)
    clock.now_s += 30
    progress.advance(6, "loss 1.23  learning_rate 0.005")
    return progress


def test_a_log_has_a_line_in_ten_seconds_at_most(screen):
    screen.live = False
    clock = Clock()
    progress = TerminalProgress(None, clock)
    progress.begin("eval:base@demo")
    progress.start("eval base", 164)
    lines = {}
    for _ in range(35):
        clock.now_s += 1
        progress.advance(4)
        progress.tick()
        lines.setdefault(len(screen.getvalue().splitlines()), clock.now_s - 100)
    progress.advance(24)
    progress.done()
    clock.now_s += 10
    progress.tick()  # says nothing twice
    assert LOG_EVERY_S == 10 and lines == {0: 1, 1: 10, 2: 20, 3: 30}
    first, *_, last = screen.getvalue().splitlines()
    assert (first, last) == ("eval base  40/164 in 10 s, 31 s left", "eval base  164/164 in 35 s")


@pytest.mark.parametrize(
    ("columns", "line"),
    [
        (130, f"stage 4 of 6  sft on 36 rows  {'━' * 12}{'─' * 12}  6/12  30 s left, run 5 min  loss 1.23  "
              "learning_rate 0.005"),
        (80, "stage 4 of 6  sft on 36 rows  ━━━━━─────  6/12  30 s left, run 5 min  loss 1.23"),
        (76, "4/6  sft on 36 rows  ━━━━━─────  6/12  30 s left, run 5 min  loss 1.23"),
        (60, "stage 4 of 6  sft on 36 rows  6/12  30 s left, run 5 min"),
        (40, "4/6  sft on 36 rows  6/12  30 s left"),
        (20, "4/6  sft on 36 rows"),
    ],
)  # fmt: skip
def test_the_line_says_what_fits(screen, monkeypatch, columns, line):
    monkeypatch.setenv("COLUMNS", str(columns))
    training(Position(4, 6, PLANNED)).tick()
    assert screen.rows[-1] == line and len(line) < columns


def test_the_time_left_of_the_run_needs_every_estimate():
    clock = Clock()
    progress = training(Position(4, 6, PLANNED), clock)
    clock.now_s += 10
    assert progress.content().times == ("20 s left, run 5 min", "20 s left")
    assert training(Position(4, 6, PLANNED | {"rl": None})).content().times[0] == "30 s left"
    assert training().content().times[0] == "30 s left"
    progress.begin("eval:base@demo")  # before its first task the estimate says what is left
    progress.start("loading")
    assert progress.content().times[0] == "1 min left"


def test_no_color_means_none(screen, monkeypatch):
    training().tick()
    assert "\x1b[32m" in screen.getvalue()
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setattr(terminal, "live_line", LiveLine())
    screen.truncate(0)
    training().tick()
    terminal.error(ConfigError("no such thing"))
    assert re.findall(r"\x1b\[[^K]", screen.getvalue()) == [] and "error: no such" in screen.getvalue()


def test_an_error_stands_out_on_a_terminal_alone(screen):
    terminal.error(ConfigError("no such \x1b[2Jthing"))
    assert screen.getvalue() == "\r\x1b[K\x1b[1;31merror:\x1b[0m no such \\x1b[2Jthing\n"
    screen.live = False
    terminal.error(ConfigError("no"))
    assert screen.getvalue().endswith("\nerror: no\n")


def test_messages_go_above_the_line_which_stays_after_an_error(screen):
    with pytest.raises(KeyError), training() as progress:
        progress.tick()
        terminal.say("warning: all is well")
        progress.tick()
        raise KeyError
    assert screen.rows[0] == "warning: all is well"
    assert screen.rows[1].startswith("sft on 36 rows") and screen.rows[2:] == [""]
    assert "?25l" not in screen.getvalue()  # a process that is killed could not show the cursor again


def test_nothing_stays_of_the_line_of_a_step_that_is_done(screen):
    with training() as progress:
        progress.tick()
        progress.done()
        progress.tick()
        terminal.say("sft: in 60 s")
    assert screen.rows == ["sft: in 60 s", ""]


def test_a_terminal_that_is_gone_ends_nothing(screen, monkeypatch):
    def fail(text: str) -> int:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(screen, "write", fail)
    with training() as progress:
        progress.tick()
        progress.say("warning: nobody reads this")


def test_a_task_advances_while_its_terminal_is_not_read(screen, monkeypatch):
    blocked, is_read = threading.Event(), threading.Event()

    def wait(text: str) -> int:
        blocked.set()
        return int(is_read.wait(30))

    monkeypatch.setattr(screen, "write", wait)
    with training() as progress:
        assert blocked.wait(30)
        progress.advance(3)
        assert not is_read.is_set() and progress.content().count == "9/12"
        is_read.set()


PROGRAM = """
import time
from lorapar_cli.progress import TerminalProgress
with TerminalProgress(None) as progress:
    progress.begin("sft")
    progress.start("sft on 36 rows", 12)
    progress.advance(6, "loss 1.23  learning_rate 0.005")
    input()
"""


def test_a_resized_terminal_gets_a_line_of_its_width():
    main, side = pty.openpty()
    environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
    environment["TERM"] = "xterm"
    termios.tcsetwinsize(side, (24, 120))
    child = subprocess.Popen(
        [sys.executable, "-c", PROGRAM], stdin=subprocess.PIPE, stderr=side, env=environment, cwd=ROOT
    )
    os.close(side)
    shown = ""
    while "learning_rate" not in shown:
        shown += os.read(main, 4096).decode()
    termios.tcsetwinsize(main, (24, 50))
    while "\r" not in shown.partition("learning_rate")[2]:
        shown += os.read(main, 4096).decode()
    child.communicate(b"\n")
    last = shown.rpartition("\r")[2]
    assert child.returncode == 0 and "6/12" in last and "learning_rate" not in last
    os.close(main)
