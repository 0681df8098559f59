"""The commands of a few lines: ask, status, list, config, demo-data and fetch."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

from lorapar_cli import terminal
from lorapar_cli.options import ConfigPath, Json, Overrides, argument, plan_of, trained, value
from stages.config.fields import MAX_INT
from stages.config.listing import annotated
from stages.errors import ConfigError
from stages.pipeline.state import state
from stages.store.artifacts import refuse_store

Question = Annotated[str | None, argument("None: it asks for one after the other.", "QUESTION")]
KINDS = "scorers, strategies, rewards, benchmarks, engines, personas or examples; all by default."
Kind = Annotated[str | None, argument(KINDS)]
Folder = Annotated[Path, argument("Folder for train.jsonl and test.jsonl.", "DIR")]
Seed = Annotated[int, value("Random seed; the same seed gives the same files.", min=0, max=MAX_INT)]
Name = Annotated[str, argument("smollm2-135m-q4, or tiny-random for smoke tests.")]


def ask(config: ConfigPath, question: Question = None, set_: Overrides = None) -> None:
    settings, steps, store = plan_of(config, set_)
    artifact = trained(settings, store, steps)
    from stages.ask import TrainedModel

    terminal.say(f"loading {settings.model.name}")
    model = TrainedModel(settings, artifact)
    if question is None:
        terminal.say("a question in each line; Ctrl-D ends")
    lines = sys.stdin if question is None else [question]
    for text in filter(None, map(str.strip, lines)):
        if question is None and not sys.stdin.isatty():  # a terminal shows what is typed
            terminal.write(text)
        for answer in model.answers(text):
            cut = "" if answer.complete else f", cut off at {model.limit}"
            cost = f"({answer.tokens} tokens{cut}, {answer.seconds:.1f} s)"
            terminal.write(f"{answer.mode} {cost}".lstrip())
            terminal.write("\n".join(f"  {line}" for line in answer.text.splitlines()))


def status(config: ConfigPath, set_: Overrides = None, as_json: Json = False) -> None:
    """Say which artifacts are current, and why the others are not."""
    _, steps, store = plan_of(config, set_)
    states = {name: state(store, step) for name, step in steps.items()}
    if as_json:
        print(json.dumps({name: {"state": s.state, "why": s.why} for name, s in states.items()}))
    else:
        head = ["step", "state", "why"]
        terminal.table(head, [[name, s.state, s.why] for name, s in states.items()], to_left=tuple(head))


def list_names(kind: Kind = None) -> None:
    """List what can be chosen by name, from the registries that define each choice."""
    choices = kinds()
    if kind is not None and kind not in choices:
        raise ConfigError(f"nothing to list under {kind!r}", f"choose from: {', '.join(choices)}")
    for name in [kind] if kind else choices:
        print(name)
        width = max(14, *map(len, choices[name]))
        for choice, text in choices[name].items():
            print(f"  {choice:<{width}} {text}")


def kinds() -> dict[str, dict[str, str]]:
    """Map kind → name → one-line description."""
    from stages.init import examples
    from stages.pipeline.resolve import registries

    listed = {**registries(), "examples": examples}
    return {kind: choices.describe() for kind, choices in listed.items()}


def print_settings() -> None:
    print("\n".join(annotated()))


def write_demo_data(folder: Folder, seed: Seed = 0) -> None:
    from stages.data.demo import write

    refuse_store(folder)
    sizes = write(folder, seed)
    terminal.say(", ".join(f"{folder}/{split}.jsonl: {n} items" for split, n in sizes.items()))


def fetch(name: Name) -> None:
    from stages.models import bundled

    folder, created = bundled.fetch(name, Path("models"))
    terminal.say(f"{folder} {'is ready' if created else 'exists already'}")


COMMANDS: dict[str, Callable[..., None]] = {
    "ask": ask, "status": status, "list": list_names, "config": print_settings,
    "demo-data": write_demo_data, "fetch": fetch,
}  # fmt: skip
