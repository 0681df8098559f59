"""`lorapar plan`: the steps that a run would do, and the time and memory of each."""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, Annotated

from lorapar_cli import options
from lorapar_cli.options import ConfigPath, LastStage, Overrides, flag, plan_of
from lorapar_cli.terminal import duration, gib, say, table
from stages.config import Config
from stages.config.fields import marks_of
from stages.pipeline.state import state
from stages.pipeline.steps import Step, ancestors
from stages.plan.estimate import Estimate, estimate
from stages.runtime import libraries
from stages.store.artifacts import Store

if TYPE_CHECKING:
    from stages.plan.texts import Texts

Check = Annotated[bool, flag("--check", "Only look for what is certain to stop the run; measure nothing.")]


_say_once = functools.cache(say)


def command(config: ConfigPath, set_: Overrides = None, check: Check = False, last: LastStage = None) -> None:
    """Say what a run would do, and what each step will take here, from some seconds of measuring.

    What does not fit into the memory, and texts that are too long, are named. What is certain to stop the run
    is an error, all of it at once.
    """
    settings, steps, store = plan_of(config, set_)
    states = {name: state(store, step).state for name, step in ancestors(steps, last).items()}
    pending = [steps[name] for name, current in states.items() if current != "current"]
    texts = checked_texts(settings, store, pending) if pending else None
    if check:
        return
    predicted = estimate(texts, pending) if texts else Estimate({}, [])
    _print_all(states, predicted)
    too_large = [s for s in pending if (predicted.costs[s.name].mib or 0) > (predicted.room or math.inf)]
    for step in too_large:
        print(f"{step.name} does not fit: lower {step.planned.memory_hint}, or set model.load_in_4bit")
    if pending:
        first = "change that, and lorapar plan" if too_large else "lorapar run"
        say(f"next: {first} {options.typed_config}{f' --to {last}' if last else ''}")


def checked_texts(settings: Config, store: Store, pending: list[Step], texts: Texts | None = None) -> Texts:
    """The texts of a config, new ones if there are none yet, for the checks and the estimate of one command.

    DataError with everything that is certain to stop one of the pending steps.
    """
    with libraries.hide_packages(*libraries.UNUSED):  # as in the stages: they take seconds, and memory
        from stages.plan import preflight
        from stages.plan.texts import Texts
    texts = texts or Texts(settings, store)
    partition = settings.partition
    for name, field in type(partition).model_fields.items():
        if name in partition.model_fields_set and partition.strategy in marks_of(field)["ignored_by"]:
            _say_once(f"partition.{name} is not read by strategy {partition.strategy}")
    preflight.require_no_problem(texts, pending)
    return texts


def _print_all(states: dict[str, str], predicted: Estimate) -> None:
    """Print the state and cost of each step, what is too long, and the total."""
    rows = []
    for name, current in states.items():
        cost = predicted.costs.get(name)
        time = "" if cost is None else "not known" if cost.seconds is None else duration(cost.seconds)
        rows.append([name, current, time, gib(cost.mib) if cost and cost.mib else ""])
    table(["step", "state", "takes about", "memory"], rows, to_left=("state",))
    for span in predicted.spans:
        if span.longer:
            of = f"{span.longer} of {len(span.lengths.ordered)} are longer than {span.setting} {span.limit}"
            print(f"{span.name}: {of} ({span.beyond}); the longest has {span.lengths.longest} tokens")
    if predicted.costs:
        seconds = [cost.seconds for cost in predicted.costs.values() if cost.seconds is not None]
        unknown = "" if len(seconds) == len(predicted.costs) else " plus what is not known"
        total = f"about {duration(sum(seconds))}{unknown}"
        guess = f"{total}; half as much or twice as much would be no surprise"
        print(guess if seconds else "how long it takes is not known")
    if predicted.room is not None:
        print(f"there are {gib(predicted.room)} of memory")
