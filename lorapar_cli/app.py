"""The `lorapar` command line: one command per stage, and the commands around them."""

import importlib
import os
import signal
import sys

import typer

from lorapar_cli import short, terminal
from lorapar_cli.commands import ABOUT, COMMANDS
from lorapar_cli.errors import report_failure
from lorapar_cli.process import end_on_signal, received, set_up
from lorapar_cli.stage import command_of
from stages import ORDER
from stages.errors import is_rust_panic
from stages.pipeline.stage import stage

app = typer.Typer(
    help=ABOUT,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)

for _name in COMMANDS:  # a stage, a short one, or a function `command` in the module of its name
    if _name in ORDER:
        _command = command_of(stage(_name))
    else:
        _command = short.COMMANDS.get(_name) or importlib.import_module(f"lorapar_cli.{_name}").command
    app.command(_name, help=COMMANDS[_name])(_command)


def main() -> None:
    """Run the command; an error becomes an `error:` line, a `hint:` line and an exit code."""
    set_up()
    try:
        app()
    except BaseException as problem:
        # The command line's library turns Ctrl-C into this exit.
        if received or (isinstance(problem, SystemExit) and problem.code == 130):
            terminal.say("stopped; the same command goes on from what is finished")
        if os.environ.get("LORAPAR_DEBUG") or not (isinstance(problem, Exception) or is_rust_panic(problem)):
            raise
        if received:  # a library caught the signal's exception in the middle of an import, and broke on it
            sys.exit(128 + received[0])
        sys.exit(report_failure(problem))
    finally:  # nothing is left to unwind, and an exception while Python exits would print a traceback
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
            if signal.getsignal(number) in (end_on_signal, signal.default_int_handler):
                signal.signal(number, signal.SIG_IGN if received else signal.SIG_DFL)
        received.clear()
