"""The command that tells what a run will do and cost."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from lorapar_cli.options import ConfigPath, Json, Overrides, plan_of, typed
from lorapar_cli.render import duration, gib, say
from lorapar_cli.tables import show, table
from stages.pipeline.plan import asked_for
from stages.pipeline.state import State, state
from stages.store import estimates
from stages.store.artifacts import Store
from stages.store.estimates import Told

if TYPE_CHECKING:
    from stages.config import Config
    from stages.pipeline.cost import Memory
    from stages.pipeline.estimate import Estimate
    from stages.pipeline.lengths import Span

MEMORY = {
    "weights": "weights",
    "optimizer": "optimizer",
    "activations": "activations",
    "KV cache": "cache",
    "libraries": "libraries",
}
"""Columns of the table of memory, and what they show of `Memory`."""


def plan(config: ConfigPath, set_: Overrides = None, as_json: Json = False) -> None:
    """Say what a run would do, and what each step will cost here, from some seconds of measuring.

    Costs are time and memory, and beside them stand the lengths of the rows with what is cut or dropped.
    """
    from stages.pipeline.estimate import Estimate, estimate

    settings, steps = plan_of(config, set_)
    store = Store(settings.root)
    asked = asked_for(steps, None)
    states = {name: state(store, step) for name, step in asked.items()}
    todo = [step for name, step in asked.items() if states[name].state != "current"]
    found = estimate(settings, todo) if todo else Estimate({}, [])
    if todo:
        costs = {step.key: found.costs[step.name] for step in todo}
        estimates.tell(settings.root, {key: Told(seconds=c.seconds, mib=c.mib) for key, c in costs.items()})
    _planned(settings, states, found, as_json)
    if todo and not as_json:
        say(f"next: lorapar run {typed(config, set_)}")


def _planned(settings: Config, states: dict[str, State], found: Estimate, as_json: bool) -> None:
    """What a run would do, with the cost of each step and of all that can be told."""
    from stages.pipeline.estimate import knobs

    if as_json:
        print(json.dumps(_plan_json(states, found)))
        return
    drawn = table("step", "state", "takes about", "memory")
    drawn.columns[1].justify = "left"
    for name, now in states.items():
        cost = found.costs.get(name)
        told = "" if cost is None else "not known" if cost.seconds is None else duration(cost.seconds)
        drawn.add_row(name, now.state, told, gib(cost.mib) if cost and cost.mib else "")
    show(drawn)
    if memories := {name: cost.memory for name, cost in found.costs.items() if cost.memory}:
        print()
        _memory(memories)
    if found.spans:
        print()
        _spans(found.spans)
    if found.costs:
        print("\n" + _together([cost.seconds for cost in found.costs.values()]))
    if found.room is not None:
        print(f"there are {gib(found.room)} of memory")
        for name, cost in found.costs.items():
            if cost.mib and cost.mib > found.room:
                print(f"{name} does not fit: lower {knobs(name, settings)}")


def _memory(memories: dict[str, Memory]) -> None:
    """What fills the memory of each step; steps that are alike in all of it share a line."""
    drawn = table("MiB", *MEMORY, "together")
    alike: dict[tuple[str, ...], list[str]] = {}
    for name, memory in memories.items():
        parts = tuple(f"{getattr(memory, part):.0f}" for part in (*MEMORY.values(), "whole"))
        alike.setdefault(parts, []).append(name)
    for parts, names in alike.items():
        drawn.add_row(", ".join(names), *parts)
    show(drawn)


def _together(seconds: list[float | None]) -> str:
    known = [each for each in seconds if each is not None]
    if not known:
        return "how long it takes is not known"
    rest = "" if len(known) == len(seconds) else ", and what is not known"
    return f"together about {duration(sum(known))}{rest}; half as much or twice as much would be no surprise"


def _spans(spans: list[Span]) -> None:
    drawn = table("tokens", "rows", "mean", "median", "99 %", "longest", "limit", "longer")
    drawn.columns[6].justify = "left"
    for span in spans:
        lengths, longer = span.lengths, span.longer
        drawn.add_row(
            span.what,
            str(number) if (number := len(lengths.ordered)) == span.rows else f"{number} of {span.rows}",
            f"{lengths.mean:.0f}",
            *map(str, (lengths.median, lengths.p99, lengths.longest)),
            "" if span.limit is None else f"{span.setting} {span.limit}",
            f"{longer}: {span.beyond}" if longer else "0",
        )
    show(drawn)


def _plan_json(states: dict[str, State], found: Estimate) -> dict[str, Any]:
    steps: dict[str, Any] = {}
    for name, now in states.items():
        cost = found.costs.get(name)
        steps[name] = {
            "state": now.state,
            "seconds": cost and cost.seconds,
            "mib": cost and cost.mib,
            "of_mib": cost and cost.memory and {part: getattr(cost.memory, part) for part in MEMORY.values()},
        }
    tokens = {
        span.what: {
            "rows": span.rows,
            "sample": len(span.lengths.ordered),
            "mean": span.lengths.mean,
            "median": span.lengths.median,
            "p99": span.lengths.p99,
            "longest": span.lengths.longest,
            "limit": span.limit,
            "longer": span.longer,
        }
        for span in found.spans
    }
    return {"steps": steps, "tokens": tokens, "memory_mib": found.room}
