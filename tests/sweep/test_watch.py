"""The view of a sweep: what it counts, how long it says the rest takes, and how it is drawn."""

import errno
import io
import time
from pathlib import Path
from types import SimpleNamespace

from rich.console import Console

from lorapar_cli.watch import LiveView, last_line, state_of_cells, time_left
from stages.sweep.local import Outcome, Running, Sweep

PLACES = {
    name: ("runs", stage, name) for name, stage in (("a", "sft"), ("b", "sft"), ("c", "rl"), ("d", "rl"))
}
WORKER = SimpleNamespace(device=None)
CELLS = {"a": [1, 3], "b": [2], "c": [1], "d": [2]}


def sweep(**state: object) -> Sweep:
    nodes = {
        place: SimpleNamespace(
            stage=place[1], title=f"{place[1]} {name}", current=False, inputs=[],
            cells=[("table", f"row {i}", 1) for i in CELLS[name]], step=SimpleNamespace(key=name),
        )
        for name, place in PLACES.items()
    }  # fmt: skip
    found = Sweep(nodes, [WORKER], Path("logs"), print)
    for name, value in state.items():
        setattr(found, name, value)
    return found


def test_cells_are_counted_by_all_that_they_need():
    """Row 1 has its SFT and waits for its RL, row 2 is running, row 3 needs the SFT alone."""
    running = {PLACES["b"]: Running(WORKER, time.monotonic(), 0)}
    waiting = [PLACES["c"], PLACES["d"]]
    found = sweep(done={PLACES["a"]}, running=running, waiting=waiting)
    assert state_of_cells(found, {}) == "cells: 1 done, 1 running, 1 waiting"
    failed = Outcome(found.nodes[PLACES["b"]], "failed", 1)
    found = sweep(done={PLACES["a"]}, waiting=waiting, ended={PLACES["b"]: failed})
    assert state_of_cells(found, {}) == "cells: 1 done, 1 failed, 1 waiting"


def test_the_time_left_is_what_the_waiting_take_and_what_is_left_of_the_running():
    begun = time.monotonic() - 20
    found = sweep(
        running={PLACES["b"]: Running(WORKER, begun, 0)}, waiting=[PLACES["c"], PLACES["d"]], slots=[]
    )
    assert abs(time_left(found, {"sft": 60, "rl": 300}) - 640) < 2
    found.slots = [None]  # a second place
    assert abs(time_left(found, {"sft": 60, "rl": 300}) - 320) < 2
    assert time_left(found, {"rl": 300}) is None
    found.ended[PLACES["a"]] = Outcome(found.nodes[PLACES["a"]], "done", 0, seconds=60)
    assert abs(time_left(found, {"rl": 300}) - 320) < 2


def test_the_view_names_what_runs_with_its_last_word(tmp_path):
    running = {PLACES["b"]: Running(SimpleNamespace(device="1"), time.monotonic(), 0)}
    found = sweep(running=running, waiting=[PLACES["c"]], logs=tmp_path)
    found.log(found.nodes[PLACES["b"]]).write_text("loading\nsft 3/36  [red]9 s[/red]\n\n")
    console = Console(file=io.StringIO(), width=100)
    console.print(LiveView({}).render(found))
    text = console.file.getvalue()
    assert "sft b (" in text and "s, device 1)" in text and "loading" not in text
    assert "sft 3/36  [red]9 s[/red]" in text
    assert last_line(tmp_path / "none") == ""


def test_a_terminal_that_was_closed_ends_the_view_and_not_the_steps(tmp_path, monkeypatch):
    def closed(*_, **__):
        raise OSError(errno.EIO, "Input/output error")

    view = LiveView({})
    monkeypatch.setattr(view.console, "print", closed)
    view.say("done")
    assert view.console.quiet
    view.console.quiet = False
    monkeypatch.setattr(view.live, "update", closed)
    view.update(sweep(running={}, waiting=[], logs=tmp_path))
    assert view.console.quiet
