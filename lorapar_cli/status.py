"""`lorapar status`: the state of each artifact, and why."""

from lorapar_cli import terminal
from lorapar_cli.options import ConfigPath, Json, Overrides, plan_of
from stages.pipeline.state import state
from stages.store.artifacts import Store


def command(config: ConfigPath, set_: Overrides = None, as_json: Json = False) -> None:
    """Say which artifacts are current, and why the others are not."""
    settings, steps = plan_of(config, set_)
    store = Store(settings.root)
    terminal.status({name: state(store, step) for name, step in steps.items()}, as_json)
