"""`lorapar ask`: a question to both modes of a trained model, in this process."""

import sys
from collections.abc import Iterator
from typing import Annotated

import typer

from lorapar_cli import terminal
from lorapar_cli.options import ConfigPath, Overrides, plan_of
from stages.config import TRAINED
from stages.data.rows import missing_path_error
from stages.pipeline.state import require_current
from stages.store.artifacts import Store


def command(
    config: ConfigPath,
    question: Annotated[
        str | None, typer.Argument(metavar="QUESTION", help="None: it asks for one after the other.")
    ] = None,
    set_: Overrides = None,
) -> None:
    settings, steps = plan_of(config, set_)
    needed = [TRAINED[target] for target in settings.eval.modes.values()]
    if not set(needed) <= set(steps):
        raise missing_path_error()
    store = Store(settings.root)
    inputs = {name: require_current(store, steps[name], steps[needed[-1]]) for name in needed}
    from stages.ask import TrainedModel

    terminal.say(f"loading {settings.model.name}")
    model = TrainedModel(settings, inputs)
    for text in [question] if question is not None else _typed():
        for answer in model.answers(text):
            cut = "" if answer.complete else f", cut off at {model.limit}"
            terminal.write(f"{answer.mode} ({answer.tokens} tokens{cut}, {answer.seconds:.1f} s)")
            terminal.write("\n".join(f"  {line}" for line in answer.text.splitlines()))


def _typed() -> Iterator[str]:
    """Yield the lines that a person types, or that another program writes, until their end."""
    is_person = sys.stdin.isatty()
    while True:
        if is_person:
            print("question (Ctrl-D ends): ", end="", flush=True)
        if not (line := sys.stdin.readline()):
            return
        if line.strip():
            yield line.strip()
