"""`lorapar status`: the state of each artifact, and why."""

import json

from lorapar_cli import terminal
from lorapar_cli.options import ConfigPath, Json, Overrides, plan_of
from stages.pipeline.state import state


def command(config: ConfigPath, set_: Overrides = None, as_json: Json = False) -> None:
    """Say which artifacts are current, and why the others are not."""
    _, steps, store = plan_of(config, set_)
    states = {name: state(store, step) for name, step in steps.items()}
    if as_json:
        print(json.dumps({name: {"state": s.state, "why": s.why} for name, s in states.items()}))
    else:
        head = ["step", "state", "why"]
        terminal.table(head, [[name, s.state, s.why] for name, s in states.items()], to_left=tuple(head))
