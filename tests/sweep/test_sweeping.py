"""What `sweep` says before and after, its view meanwhile, and what it refuses at once."""

import errno
import io
import re
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import typer
from conftest import ROOT
from rich.console import Console

from lorapar_cli import sweep
from lorapar_cli.watch import LiveView, last_line, state_of_cells, time_left
from stages.errors import ConfigError
from stages.sweep.local import Outcome, Running, Sweep, Worker

TABLE = """
title: Two masks
base: base.yaml
rows: {one: {partition.theta: 0.9}, two: {partition.theta: 0.5}}
seeds: [1, 2]
columns: {SFT: sft@demo}
"""


@pytest.fixture
def two(tiny, demo_data, tmp_path) -> list[Path]:
    """Two table files on the smoke config."""
    base = tmp_path / "base.yaml"
    base.write_text(
        f"extends: {ROOT / 'configs/smoke.yaml'}\nruns_dir: {tmp_path / 'runs'}\nmodel: {{name: {tiny}}}\n"
        f"data: {{path: {demo_data / 'train.jsonl'}}}\n"
        f"eval: {{benchmarks: {{demo: {{path: {demo_data / 'test.jsonl'}}}}}}}\n"
    )
    found = []
    for path in (tmp_path / "a.yaml", tmp_path / "b.yaml"):
        path.write_text(TABLE)
        found.append(path)
    return found


def test_mistakes_of_all_tables_are_said_at_once(two, lorapar):
    for path, column in zip(two, ("dpo@demo", "ppo@demo"), strict=True):
        path.write_text(TABLE.replace("sft@demo", column))
    for command in (("sweep", *two, "--dry-run"), ("report", *two, "--out", two[0].with_name("out"))):
        done = lorapar(*command)
        assert done.code == 78 and "no row has dpo@demo" in done.err and "no row has ppo@demo" in done.err
    assert not two[0].with_name("out").exists()


def test_two_missing_files_are_missing_files(tmp_path, lorapar):
    done = lorapar("sweep", tmp_path / "a.yaml", tmp_path / "b.yaml", "--dry-run")
    assert done.code == 66 and "a.yaml" in done.err and "b.yaml" in done.err
    assert "hint: an example: lorapar init --example tables/" in done.err
    done = lorapar("report", tmp_path / "none.yaml", "--out", tmp_path / "out")
    assert done.code == 66 and "no file" in done.err and not (tmp_path / "out").exists()


def test_how_many_cells_share_a_stage_is_said_and_nothing_started(two, lorapar, monkeypatch):
    """Four cells: labels of training and test rows, importance of two seeds, and a training of each."""
    monkeypatch.setattr(Worker, "start", lambda *_: pytest.fail("started"))
    done = lorapar("sweep", two[0], "--dry-run")
    assert done.code == 0 and "how long it takes is not known" in done.err
    lines = {line.split()[0]: line.split()[1:] for line in done.out.splitlines()}
    assert lines["classify"][:3] == ["2", "4", "0"] and lines["score"][:3] == ["2", "4", "0"]
    assert lines["sft"][:3] == ["4", "4", "0"]


def test_the_time_is_that_of_so_many_at_a_time(two, capfd):
    nodes = {
        ("r", "sft", str(n)): SimpleNamespace(stage="sft", current=False, cells=[("t", "row", n)])
        for n in range(4)
    }
    sweep._announce([None] * 4, nodes, {"sft": 3600}, 2)
    assert "together about 2.0 h, 2 at a time" in capfd.readouterr().err


def test_devices_are_those_that_are_visible(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert sweep._slots(3, None) == [None] * 3 and sweep._slots(None, "0+1,2 + 3") == ["0,1", "2,3"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5")
    assert sweep._slots(None, "4, 5") == ["4", "5"]
    with pytest.raises(ConfigError, match="--devices 0,5: 0 is not in CUDA_VISIBLE_DEVICES=4,5"):
        sweep._slots(None, "0,5")


@pytest.mark.parametrize("devices", ["0,,1", "0+", "", "0,1+0"])
def test_devices_that_are_none(devices):
    with pytest.raises(ConfigError, match=re.escape(f"--devices {devices}: ")):
        sweep._slots(None, devices)


def test_the_end_says_what_failed_and_why(tmp_path, capfd):
    log = tmp_path / "rl.log"
    older = "error: the server was gone\n"
    log.write_text(f"{older}rl 3/9\nerror: no example is labelled System 2\n  hint: other voters\n\n")

    def node(stage: str, *cells: tuple[str, int]) -> SimpleNamespace:
        step = SimpleNamespace(name=stage, key="0a1b")
        return SimpleNamespace(step=step, cells=[("t", row, seed) for row, seed in cells])

    ended = [
        Outcome(node("sft", ("one", 1)), "done", 0, log),
        Outcome(node("rl", ("one", 1), ("two", 2)), "failed", 65, log),
        Outcome(node("score", ("one", 1)), "failed", 0, log),
        Outcome(node("rl", ("two", 2)), "failed", 137, log, log_offset=len(log.read_bytes())),
        Outcome(node("eval:rl@demo", ("two", 2)), "left out"),
    ]
    with pytest.raises(typer.Exit) as caught:
        sweep._report_failures(ended, 4)
    said = capfd.readouterr()
    assert caught.value.exit_code == 65 and "2 of 4 cells are not complete" in said.err
    rl, other, killed, after = said.out.splitlines()[1:]
    assert "made another artifact, because its inputs have changed; see" in other
    assert "no output; see" in killed
    assert re.match(r"rl 0a1b +failed +65 +no example is labelled System 2; see .*rl.log", rl)
    assert "(one, seed 1; two, seed 2)" in rl and "sft" not in said.out
    assert re.match(r"eval:rl@demo 0a1b +left out +a step that it needs failed \(two, seed 2\)", after)


PLACES = {
    name: ("runs", stage, name) for name, stage in (("a", "sft"), ("b", "sft"), ("c", "rl"), ("d", "rl"))
}
WORKER = SimpleNamespace(device=None)
CELLS = {"a": [1, 3], "b": [2], "c": [1], "d": [2]}


def sweep_in(**state: object) -> Sweep:
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
    found = sweep_in(done={PLACES["a"]}, running=running, waiting=waiting)
    assert state_of_cells(found, {}) == "cells: 1 done, 1 running, 1 waiting"
    failed = Outcome(found.nodes[PLACES["b"]], "failed", 1)
    found = sweep_in(done={PLACES["a"]}, waiting=waiting, ended={PLACES["b"]: failed})
    assert state_of_cells(found, {}) == "cells: 1 done, 1 failed, 1 waiting"


def test_the_time_left_is_what_the_waiting_take_and_what_is_left_of_the_running():
    begun = time.monotonic() - 20
    found = sweep_in(
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
    found = sweep_in(running=running, waiting=[PLACES["c"]], logs=tmp_path)
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
    view.update(sweep_in(running={}, waiting=[], logs=tmp_path))
    assert view.console.quiet
