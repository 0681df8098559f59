"""The command that tells what a run will do and cost."""

from __future__ import annotations

import json
import logging
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorapar_cli.options import ConfigPath, Json, Overrides, plan_of, typed
from lorapar_cli.tables import show, table
from lorapar_cli.terminal import duration, gib, nothing_to_do, say
from stages.pipeline.state import State, state
from stages.pipeline.steps import ancestors
from stages.plan.estimate import Estimate, estimate, knobs
from stages.runtime import resources
from stages.store import estimates
from stages.store.artifacts import Store
from stages.store.estimates import PlannedCost

if TYPE_CHECKING:
    from stages.config import Config
    from stages.plan.cost import MemoryEstimate
    from stages.plan.lengths import Span

MEMORY = {
    "weights": "weights",
    "optimizer": "optimizer",
    "activations": "activations",
    "KV cache": "cache",
    "libraries": "libraries",
}
"""Columns of the table of memory, and what they show of `Memory`."""


def command(
    config: ConfigPath,
    set_: Overrides = None,
    verbose: Annotated[
        bool, typer.Option("--verbose", help="Also what fills the memory, and all lengths of texts.")
    ] = False,
    brief: Annotated[
        bool, typer.Option("--brief", help="Only how long it takes, and what is wrong.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Say what a run would do, and what each step will take here, from some seconds of measuring.

    What does not fit into the memory, and texts that are too long, are named.
    """
    if brief:
        logging.getLogger("stages").setLevel(logging.WARNING)
    settings, steps = plan_of(config, set_)
    store = Store(settings.root)
    states = {name: state(store, step) for name, step in ancestors(steps, None).items()}
    todo = [steps[name] for name, now in states.items() if now.state != "current"]
    estimated = estimate(settings, todo) if todo else Estimate({}, [])
    if todo:
        costs = {step.key: estimated.costs[step.name] for step in todo}
        estimates.save(
            settings.root, {key: PlannedCost(seconds=c.seconds, mib=c.mib) for key, c in costs.items()}
        )
    if as_json:
        print(json.dumps(_plan_json(states, estimated)))
    elif brief:
        _brief(settings, estimated)
    else:
        _planned(settings, states, estimated, verbose)
        if todo:
            say(f"next: lorapar run {typed(config, set_)}")


def _brief(settings: Config, estimated: Estimate) -> None:
    if not estimated.costs:
        nothing_to_do()
        return
    print(_busy(estimated) or f"{_about(estimated)} here")
    for name in estimated.too_large:
        print(f"{name} does not fit: lower {knobs(name, settings)}")


def _planned(settings: Config, states: dict[str, State], estimated: Estimate, verbose: bool) -> None:
    """What a run would do, with the cost of each step and of all that can be told."""
    drawn = table("step", "state", "takes about", "memory")
    drawn.columns[1].justify = "left"
    for name, now in states.items():
        cost = estimated.costs.get(name)
        told = "" if cost is None else "not known" if cost.seconds is None else duration(cost.seconds)
        drawn.add_row(name, now.state, told, gib(cost.mib) if cost and cost.mib else "")
    show(drawn)
    memories = {name: cost.memory for name, cost in estimated.costs.items() if cost.memory}
    if shown := {n: memory for n, memory in memories.items() if verbose or n in estimated.too_large}:
        print()
        _memory(shown)
    if spans := [span for span in estimated.spans if verbose or span.longer]:
        print()
        _spans(spans)
    if estimated.costs:
        print(f"\n{_about(estimated)}; half as much or twice as much would be no surprise")
        if busy := _busy(estimated):
            print(busy)
    if estimated.room is not None:
        print(f"there are {gib(estimated.room)} of memory")
    for name in estimated.too_large:
        print(f"{name} does not fit: lower {knobs(name, settings)}")


def _about(estimated: Estimate) -> str:
    """How long all steps take together."""
    if not estimated.seconds:
        return "how long it takes is not known"
    rest = "" if len(estimated.seconds) == len(estimated.costs) else ", and what is not known,"
    return f"about {_in_words(sum(estimated.seconds))}{rest}"


def _in_words(seconds: float) -> str:
    if seconds < 90:
        return f"{max(1, round(seconds))} seconds"
    return f"{round(seconds / 60)} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"


def _busy(estimated: Estimate) -> str | None:
    """That others compute here, whose work is not in the estimate; None if they do not."""
    if estimated.busy_cores is None:
        return None
    cores = f"{estimated.busy_cores:.1f} of {resources.usable_cores()} cores"
    alone = f"alone it would take {_about(estimated)}" if estimated.seconds else _about(estimated)
    return f"this machine is busy with other work: {cores}; {alone}"


def _memory(memories: dict[str, MemoryEstimate]) -> None:
    """What fills the memory of each step; steps that are alike in all of it share a line."""
    drawn = table("MiB", *MEMORY, "together")
    alike: dict[tuple[str, ...], list[str]] = {}
    for name, memory in memories.items():
        parts = tuple(f"{getattr(memory, part):.0f}" for part in (*MEMORY.values(), "total"))
        alike.setdefault(parts, []).append(name)
    for parts, names in alike.items():
        drawn.add_row(", ".join(names), *parts)
    show(drawn)


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


def _plan_json(states: dict[str, State], estimated: Estimate) -> dict[str, Any]:
    steps: dict[str, Any] = {}
    for name, now in states.items():
        cost = estimated.costs.get(name)
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
        for span in estimated.spans
    }
    return {
        "steps": steps,
        "tokens": tokens,
        "memory_mib": estimated.room,
        "busy_cores": estimated.busy_cores,
    }
