"""`lorapar ask`: a question to both modes of a trained model, in this process."""

import sys
from typing import Annotated

from lorapar_cli import terminal
from lorapar_cli.options import ConfigPath, Overrides, argument, plan_of, trained
from stages.config import MODES

Question = Annotated[str | None, argument("None: it asks for one after the other.", "QUESTION")]


def command(config: ConfigPath, question: Question = None, set_: Overrides = None) -> None:
    settings, steps, store = plan_of(config, set_)
    artifacts = trained(store, steps, list(MODES.values()))
    from stages.ask import TrainedModel

    terminal.say(f"loading {settings.model.name}")
    model = TrainedModel(settings, artifacts)
    if question is None:
        terminal.say("a question in each line; Ctrl-D ends")
    lines = sys.stdin if question is None else [question]
    for text in filter(None, map(str.strip, lines)):
        for answer in model.answers(text):
            cut = "" if answer.complete else f", cut off at {model.limit}"
            terminal.write(f"{answer.mode} ({answer.tokens} tokens{cut}, {answer.seconds:.1f} s)")
            terminal.write("\n".join(f"  {line}" for line in answer.text.splitlines()))
